"""The command ``fastsdpo signal``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsdpo.data import HindsightTemplate, Interaction, extract_interactions, load_conversations
from fastsdpo.data.templates import PRESETS
from fastsdpo.signal.compute import NEUTRAL_FOLLOWUP, choose_unrelated, compute_signal
from fastsdpo.signal.figure import render_png
from fastsdpo.signal.page import render_html
from fastsdpo.signal.terminal import color_depth, render_terminal, terminal_theme

DESCRIPTION = """\
Show what a user's follow-up tells the model about each token of its answer: the log-ratio
log p(token | prompt, follow-up) - log p(token | prompt), in nats, under the real follow-up and,
for comparison, under an unrelated one.
"""

EXAMPLES = """\
examples:
  fastsdpo signal conversations.jsonl --model path/to/model
  fastsdpo signal interactions.jsonl --index 7 --model model.gguf --html signal.html
  fastsdpo signal --model MODEL --prompt "Name a fruit." --completion "An apple." \\
      --followup "Please answer in capital letters."

exit status: 0; 1 for input, a model or a file that cannot be used; 2 for wrong options.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsdpo signal",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("what to look at")
    source.add_argument(
        "source",
        nargs="?",
        help="conversations or interactions, in any layout that `fastsdpo prepare` reads; "
        "'-' reads JSON or JSON Lines from standard input",
    )
    source.add_argument("--index", type=int, help="number of the interaction in the source, from 0 (default 0)")
    source.add_argument("--id", help="id of the interaction, or of a conversation (its first interaction)")
    source.add_argument("--max-history-messages", type=int, metavar="N")
    source.add_argument("--prompt", metavar="TEXT", help="a user's message, instead of a source")
    source.add_argument("--system", metavar="TEXT", help="a system message before --prompt")
    source.add_argument(
        "--completion",
        metavar="TEXT",
        help="the answer to look at; without it the model writes one, sampled at temperature 1",
    )
    source.add_argument("--followup", metavar="TEXT", help="the follow-up; replaces the source's where given")
    source.add_argument(
        "--unrelated",
        metavar="TEXT",
        help="the follow-up to compare with (default: that of another conversation in the "
        "source, or else a built-in one)",
    )
    source.add_argument("--no-unrelated", action="store_true", help="compare with nothing")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--template",
        default="note",
        metavar="NAME|TEXT",
        help=f"hindsight template: {', '.join(PRESETS)}, or a text with {{o}} (default note)",
    )
    method.add_argument("--temperature", type=float, default=1.0)
    method.add_argument("--max-prompt-length", type=int, default=2048, metavar="TOKENS")
    method.add_argument("--max-completion-length", type=int, default=2048, metavar="TOKENS")
    method.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer that the model writes")
    method.add_argument("--seed", type=int, default=0, help="of an answer that the model writes")

    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="folder, hub id or GGUF file, or an adapter")
    model.add_argument("--gguf-file", help="the GGUF file in that folder or repository")
    model.add_argument("--tokenizer", help="folder, hub id or GGUF file (default: the model's)")
    model.add_argument("--revision", help="branch, tag or commit of a hub id")
    model.add_argument("--dtype", help="auto, float32, bfloat16, ... (default: float32 on a CPU)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    model.add_argument("--attn-implementation", help="eager, sdpa, ...")
    model.add_argument("--trust-remote-code", action="store_true")

    output = parser.add_argument_group("output")
    output.add_argument("--html", metavar="FILE", type=Path, help="write a self-contained page")
    output.add_argument("--png", metavar="FILE", type=Path, help="write a picture")
    output.add_argument("--json", metavar="FILE", type=Path, help="write all numbers")
    output.add_argument("--values", action="store_true", help="print the numbers of every token")
    output.add_argument("--scale", type=float, metavar="NATS", help="log-ratio at which colours saturate")
    output.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="(default auto)")
    output.add_argument(
        "--theme",
        choices=["auto", "light", "dark"],
        default="auto",
        help="of the terminal and the picture (auto: COLORFGBG or else dark; the picture light)",
    )
    output.add_argument("--quiet", action="store_true", help="print nothing, write files only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _check_options(parser, args)
    try:
        return _run(args)
    except ModuleNotFoundError as error:
        message = f"needs the package {error.name!r}; install it with: pip install 'fastsdpo[train]'"
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        message = str(error)
    print(f"fastsdpo signal: {message}", file=sys.stderr)
    return 1


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.source is None) == (args.prompt is None):
        parser.error("give either a source or --prompt")
    if args.prompt is not None and args.followup is None:
        parser.error("--prompt needs --followup")
    if args.source is not None and (args.completion is not None or args.system is not None):
        parser.error("--completion and --system go with --prompt, not with a source")
    if args.source is None and (args.index is not None or args.id is not None):
        parser.error("--index and --id need a source")
    if args.index is not None and args.id is not None:
        parser.error("give --index or --id, not both")
    if args.index is not None and args.index < 0:
        parser.error(f"--index must be at least 0, got {args.index}")
    if args.no_unrelated and args.unrelated is not None:
        parser.error("give --unrelated or --no-unrelated, not both")
    if not 0 < args.temperature < float("inf"):
        parser.error(f"--temperature must be positive, got {args.temperature}")
    if args.scale is not None and not 0 < args.scale < float("inf"):
        parser.error(f"--scale must be positive, got {args.scale}")
    for name in ("html", "png", "json"):
        path = getattr(args, name)
        # Before minutes are spent on a model.
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name} must be a file in an existing folder, got {path}")


def _run(args: argparse.Namespace) -> int:
    if args.source is not None:
        interaction, unrelated = _from_source(args)
    else:
        prompt = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompt.append({"role": "user", "content": args.prompt})
        interaction = Interaction(prompt, args.completion or "", args.followup)
        unrelated = NEUTRAL_FOLLOWUP
    if args.unrelated is not None:
        unrelated = args.unrelated
    template = HindsightTemplate.parse(args.template)
    for followup in [interaction.followup] + ([] if args.no_unrelated else [unrelated]):
        template.render(followup)  # a blank one is refused before minutes are spent on a model

    from transformers.utils import logging as transformers_logging

    if args.quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    from fastsdpo.modeling import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(
        args.model,
        gguf_file=args.gguf_file,
        tokenizer=args.tokenizer,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    notes = []
    if args.prompt is not None and args.completion is None:
        answer, finished = _generate(model, tokenizer, interaction.prompt, args.max_new_tokens, args.seed)
        if not answer:
            raise ValueError(
                f"the model said nothing in {args.max_new_tokens} tokens but reasoning or control "
                "tokens; raise --max-new-tokens or give --completion"
            )
        interaction = replace(interaction, completion=answer)
        ended = "" if finished else f", stopped after {args.max_new_tokens} tokens"
        notes.append(f"The model wrote this answer itself (seed {args.seed}{ended}).")
    result = compute_signal(
        model,
        tokenizer,
        interaction,
        template,
        unrelated=None if args.no_unrelated else unrelated,
        temperature=args.temperature,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
    )
    result = replace(result, model=args.model, notes=notes + result.notes)

    if args.html is not None:
        _write(args.html, render_html(result, limit=args.scale).encode(errors="replace"))
    if args.png is not None:
        theme = "light" if args.theme == "auto" else args.theme
        _write(args.png, render_png(result, limit=args.scale, theme=theme))
    if args.json is not None:
        _write(args.json, (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    if not args.quiet:
        colors = {"never": 0, "always": max(8, color_depth(sys.stdout))}.get(args.color, color_depth(sys.stdout))
        theme = terminal_theme() if args.theme == "auto" else args.theme
        text = render_terminal(result, colors=colors, theme=theme, limit=args.scale, values=args.values)
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    return 0


def _from_source(args: argparse.Namespace) -> tuple[Interaction, str]:
    """The interaction that was asked for and an unrelated follow-up from the same source."""
    if args.source == "-":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "standard-input.json"
            path.write_bytes(sys.stdin.buffer.read())
            return _select(args, path)
    return _select(args, args.source)


def _select(args: argparse.Namespace, source: str | Path) -> tuple[Interaction, str]:
    def interactions() -> Iterator[Interaction]:
        for conversation in load_conversations(source):
            yield from extract_interactions(conversation, max_history_messages=args.max_history_messages)

    found = None
    count = 0
    for count, item in enumerate(interactions(), 1):
        if args.id is None:
            wanted = count - 1 == (args.index or 0)
        else:
            wanted = args.id in (item.id, item.conversation_id)
        if wanted:
            found = item
            break
    if found is None:
        what = f"index {args.index or 0}" if args.id is None else f"id {args.id!r}"
        raise ValueError(f"{args.source}: no interaction with {what} among the {count} there")
    if args.followup is not None:
        found = replace(found, followup=args.followup)
    if args.no_unrelated or args.unrelated is not None:
        return found, NEUTRAL_FOLLOWUP
    return found, choose_unrelated(interactions(), found)


def _generate(model: Any, tokenizer: Any, prompt: list[dict], max_new_tokens: int, seed: int) -> tuple[str, bool]:
    """An answer drawn from the model, as on-policy data are, and whether it came to an end."""
    import torch

    from fastsdpo.data import InteractionTokenizer

    tokenize = InteractionTokenizer(tokenizer, "note", max_prompt_length=None)
    asked = torch.tensor([tokenize.generation_prompt(prompt)], device=model.device)
    ends = tokenize.end_ids(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    ids = output[0, asked.shape[1] :].tolist()
    return tokenize.said(ids), ids[-1] in ends


def _write(path: Path, content: bytes) -> None:
    """Writes the whole file or leaves the old one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
