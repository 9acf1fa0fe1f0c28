"""`fastsdpo signal --cases`: the signals of a file of cases, with one model load, and their heatmaps."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsdpo.data import Interaction
from fastsdpo.data.interactions import is_blank

FOLLOWUPS = ("followup_message", "feedback_followup")  # as the published files name it


def read_cases(path: Path, unrelated: bool) -> list[tuple[str, Interaction, str | None]]:
    """Name, interaction (with an empty answer where the case has none) and unrelated follow-up of each case.

    Args:
        path: JSON: a list of cases, or an object whose ``cases`` are that; or JSON Lines. A case has ``raw_prompt``,
            ``followup_message`` (or ``feedback_followup``), ``unrelated_followup``, and may have ``id`` and
            ``completion``.

    Raises:
        ValueError: the file or a case is not of that form, with the case's number.
    """
    text = path.read_text("utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"--cases {path}: is neither JSON nor JSON Lines: {error}") from None
    cases = found.get("cases", [found]) if isinstance(found, dict) else found
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"--cases {path}: there are no cases")
    return [_read_case(f"--cases {path}: case {n}", case, n, unrelated) for n, case in enumerate(cases, 1)]


def _read_case(where: str, case: Any, number: int, unrelated: bool) -> tuple[str, Interaction, str | None]:
    def text(*names: str) -> str:
        given = [case[name] for name in names if name in case] if isinstance(case, dict) else []
        if not given or not isinstance(given[0], str) or is_blank(given[0]):
            raise ValueError(f"{where}: needs a text {' or '.join(map(repr, names))}")
        return given[0]

    prompt, followup = [{"role": "user", "content": text("raw_prompt")}], text(*FOLLOWUPS)
    other = text("unrelated_followup") if unrelated else None
    answer = text("completion") if "completion" in case else ""
    return str(case.get("id", number)), Interaction(prompt, answer, followup), other


def signal_cases(options: argparse.Namespace) -> int:
    """Computes all, writes the files asked for and prints a line for each case."""
    from fastsdpo.commands.running import DONE
    from fastsdpo.commands.signal import load, signal_of, template_of, write_answer

    cases = read_cases(options.cases, not options.no_unrelated)
    template_of(options)  # a wrong one is refused before minutes are spent on a model
    if options.heatmap is not None:
        import matplotlib  # noqa: F401  missing, it is said before minutes are spent on a model
    model, tokenizer = load(options)
    results, written = [], {}
    for name, interaction, unrelated in cases:
        notes = []
        if not interaction.completion:
            prompt = interaction.prompt[-1]["content"]
            if prompt not in written:  # cases that share a prompt share the answer
                written[prompt] = write_answer(model, tokenizer, interaction.prompt, options)
            answer, note = written[prompt]
            interaction, notes = replace(interaction, completion=answer), [note]
        result = signal_of(model, tokenizer, interaction, unrelated, notes, options)
        results.append(result)
        if not options.quiet:
            told = [f"{title.split()[0].lower()} {s.mean_absolute:.3f}" for title, s in result.followups]
            print(f"{name:32} mean |log-ratio| {'  '.join(told)}  {len(result.token_ids)} tokens")
    names = [name for name, _, _ in cases]
    if options.heatmap is not None:
        from fastsdpo.signal.heatmap import SCALE, draw_heatmaps

        draw_heatmaps(options.heatmap, results, names, options.scale or SCALE)
    if options.json is not None:
        rows = [{"case": name, **result.to_dict()} for name, result in zip(names, results)]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return DONE
