"""What a user's follow-up tells the model about each token of its answer: `fastsdpo signal`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastsdpo.commands.options import add_model_source_options, model_source
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_file
from fastsdpo.commands.running import DONE, run_command
from fastsdpo.commands.signal_cases import signal_cases
from fastsdpo.data import HindsightTemplate, Interaction, extract_interactions, load_conversations
from fastsdpo.data.output import atomic_file
from fastsdpo.data.templates import AUTO, PRESETS, choose_template
from fastsdpo.signal.compute import NEUTRAL_FOLLOWUP, SignalResult, choose_unrelated, compute_signal, neutral_followup
from fastsdpo.signal.page import render_html
from fastsdpo.signal.terminal import color_depth, render_terminal, terminal_theme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = """\
Shows what a user's follow-up tells the model about each word of its answer: how much more or less the model would
say it, had it known the follow-up. The numbers are log p(token | prompt, follow-up) - log p(token | prompt), in nats,
for the real follow-up and, for comparison, for an unrelated one.
"""

EXAMPLES = """\
Examples:
  fastsdpo signal conversations.jsonl --model path/to/model
  fastsdpo signal interactions.jsonl --index 7 --model model.gguf --html signal.html

A correction that works: the word that the user corrects becomes less likely, and nothing else does (by 2.4 nats
with SmolLM2-135M-Instruct):
  fastsdpo signal --model MODEL --prompt "What is the capital of Australia?" \\
      --completion "The capital of Australia is Sydney." --followup "No, it is Canberra."

A small model that merely copies: the word that the user rejects becomes more likely, since the follow-up has it (by
5.5 nats with the same model; look at --values, and train on such follow-ups with a larger model only):
  fastsdpo signal --model MODEL --prompt "Name a fruit." \\
      --completion "A durian." --followup "I do not like durian at all."

Exit status: 0 done; 1 an input, a model or a file cannot be used; 2 wrong options.
"""

# The options that name a file to write.
WRITTEN = ("html", "json", "heatmap")


def build_parser() -> Parser:
    parser = Parser("signal", DESCRIPTION, epilog=EXAMPLES)
    _add_source(parser.add_argument_group("what to look at"))
    parser.add_config_option()

    method = parser.add_argument_group("method")
    method.add_argument(
        "--template",
        default=AUTO,
        metavar="NAME|TEXT",
        help=f"How the follow-up enters the prompt: {', '.join(PRESETS)}, or a text with {{o}}. auto, as in training: "
        "note for models below a billion weights, else online-v1.",
    )
    method.add_argument("--temperature", type=float, default=1.0, help="Divides the logits.")
    method.add_argument(
        "--max-prompt-length", type=int, default=2048, metavar="TOKENS", help="The most tokens of the history."
    )
    method.add_argument(
        "--max-completion-length", type=int, default=2048, metavar="TOKENS", help="The most tokens of the answer."
    )
    method.add_argument(
        "--max-new-tokens", type=int, default=256, help="The most tokens of an answer that the model writes."
    )
    method.add_argument("--seed", type=int, default=0, help="Decides the answer that the model writes.")

    model = parser.add_argument_group("model")
    add_model_source_options(model)

    output = parser.add_argument_group("output")
    output.add_argument("--html", metavar="FILE", type=Path, help="Write a page for a browser, in one file.")
    output.add_argument(
        "--heatmap", metavar="FILE", type=Path, help="For --cases: write a PNG with a strip for each case."
    )
    output.add_argument("--json", metavar="FILE", type=Path, help="Write all numbers as JSON.")
    output.add_argument("--values", action="store_true", help="Print the numbers of every token.")
    output.add_argument(
        "--scale", type=float, metavar="NATS", help="The log-ratio at which a colour is at its strongest. Default: 3."
    )
    output.add_argument(
        "--color", choices=["auto", "always", "never"], default="auto", help="Whether the output has colours."
    )
    output.add_argument(
        "--theme",
        choices=["auto", "light", "dark"],
        default="auto",
        help="The background of the terminal. auto goes by the variable COLORFGBG, and takes dark where it is not "
        "set.",
    )
    output.add_argument("--quiet", action="store_true", help="Print nothing, write files only.")
    return parser


def _add_source(source: argparse._ArgumentGroup) -> None:
    source.add_argument(
        "source",
        nargs="?",
        help="Conversations or interactions, in any layout that `fastsdpo prepare` reads. '-' reads JSON or JSON "
        "Lines from standard input.",
    )
    source.add_argument(
        "--cases",
        metavar="FILE",
        type=Path,
        help="A file with many cases: JSON with 'raw_prompt', 'followup_message' and 'unrelated_followup'. The "
        "model writes the answers.",
    )
    source.add_argument(
        "--index", type=int, help="The number of the interaction in the source, counted from 0. Default: 0."
    )
    source.add_argument("--id", help="The id of the interaction, or of a conversation (then its first interaction).")
    source.add_argument(
        "--max-history-messages", type=int, metavar="N", help="Keep the last N messages of the history. Default: all."
    )
    source.add_argument("--prompt", metavar="TEXT", help="A user's message, instead of a source.")
    source.add_argument("--system", metavar="TEXT", help="A system message before --prompt.")
    source.add_argument(
        "--completion",
        metavar="TEXT",
        help="The answer to look at. Default: the model writes one, sampled at temperature 1.",
    )
    source.add_argument("--followup", metavar="TEXT", help="The user's reply to the answer. Default: the source's.")
    source.add_argument(
        "--unrelated",
        metavar="TEXT",
        help="The follow-up to compare with. Default: one of another conversation in the source, or a built-in "
        "one, of similar length.",
    )
    source.add_argument("--no-unrelated", action="store_true", help="Compare with nothing.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    _check_options(parser, options)

    def run(options: argparse.Namespace) -> int:
        for name in WRITTEN:  # before minutes are spent on a model
            check_file(getattr(options, name), options.cases or options.source, f"--{name}")
        return signal(options) if options.cases is None else signal_cases(options)

    return run_command(parser, run, options)


def _check_options(parser: Parser, options: argparse.Namespace) -> None:
    if [options.source, options.prompt, options.cases].count(None) != 2:
        parser.error("give either a source or --prompt, or --cases")
    one = ("completion", "system", "followup", "unrelated", "index", "id", "html", "values", "color", "theme")
    if options.cases is not None and options.given.keys() & set(one):
        parser.error(f"--cases goes without {', '.join(f'--{name}' for name in one)}")
    if options.heatmap is not None and options.cases is None:
        parser.error("--heatmap needs --cases")
    if options.prompt is not None and options.followup is None:
        parser.error("--prompt needs --followup")
    if options.source is not None and (options.completion is not None or options.system is not None):
        parser.error("--completion and --system go with --prompt, not with a source")
    if options.source is None and (options.index is not None or options.id is not None):
        parser.error("--index and --id need a source")
    if options.source is None and options.max_history_messages is not None:
        parser.error("--max-history-messages needs a source")
    if options.source is not None or options.completion is not None:
        for flag in ("max-new-tokens", "seed"):
            if flag in options.given:
                parser.error(f"--{flag} is of an answer that the model writes, and this one is there already")
    for flag in ("values", "color", "theme"):
        if options.quiet and flag in options.given:
            parser.error(f"give --quiet or --{flag}, not both")
    if options.quiet and [options.html, options.json, options.heatmap] == [None, None, None]:
        parser.error("--quiet needs --html, --json or --heatmap: else nothing would come of it")
    if options.color == "never" and options.theme != "auto":
        parser.error("--theme needs colours, and --color never turns them off")
    if options.scale is not None and options.cases is not None and options.heatmap is None:
        parser.error("--scale needs --heatmap where --cases is given")
    if options.scale is not None and options.quiet and options.html is None and options.heatmap is None:
        parser.error("--scale needs --html where --quiet is given")
    if options.index is not None and options.id is not None:
        parser.error("give --index or --id, not both")
    if options.index is not None and options.index < 0:
        parser.error(f"--index must be at least 0, got {options.index}")
    if options.no_unrelated and options.unrelated is not None:
        parser.error("give --unrelated or --no-unrelated, not both")
    if not 0 < options.temperature < float("inf"):
        parser.error(f"--temperature must be positive, got {options.temperature}")
    if options.scale is not None and not 0 < options.scale < float("inf"):
        parser.error(f"--scale must be positive, got {options.scale}")
    for name in WRITTEN:
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name} must be a file in an existing folder, got {path}")


def signal(options: argparse.Namespace) -> int:
    """Reads the interaction, computes its signal, shows it and writes the files asked for."""
    interaction, unrelated = read_interaction(options)
    for followup in [interaction.followup] + ([] if unrelated is None else [unrelated]):
        template_of(options).render(followup)  # a blank one is refused before minutes are spent on a model
    model, tokenizer = load(options)
    notes = []
    if options.prompt is not None and options.completion is None:
        answer, note = write_answer(model, tokenizer, interaction.prompt, options)
        interaction = replace(interaction, completion=answer)
        notes.append(note)
    show(signal_of(model, tokenizer, interaction, unrelated, notes, options), options)
    return DONE


def signal_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    interaction: Interaction,
    unrelated: str | None,
    notes: list[str],
    options: argparse.Namespace,
) -> SignalResult:
    """The signal under the command's options, with ``notes`` before its own."""
    result = compute_signal(
        model,
        tokenizer,
        interaction,
        template_of(options, model),
        unrelated=unrelated,
        temperature=options.temperature,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
    )
    return replace(result, model=options.model, notes=notes + result.notes)


def show(result: SignalResult, options: argparse.Namespace) -> None:
    """Writes the files of the options and prints the signal."""
    if options.html is not None:
        with atomic_file(options.html) as file:
            file.write(render_html(result, limit=options.scale).encode("utf-8", "replace"))
    if options.json is not None:
        with atomic_file(options.json) as file:
            file.write(json.dumps(result.to_dict(), indent=1).encode() + b"\n")
    if options.quiet:
        return
    depth = color_depth(sys.stdout)
    text = render_terminal(
        result,
        colors={"never": 0, "always": max(8, depth)}.get(options.color, depth),
        theme=terminal_theme() if options.theme == "auto" else options.theme,
        limit=options.scale,
        values=options.values,
    )
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))


def read_interaction(options: argparse.Namespace) -> tuple[Interaction, str | None]:
    """The interaction to look at and the follow-up to compare with; None: no comparison."""
    if options.source is None:
        prompt = [] if options.system is None else [{"role": "system", "content": options.system}]
        prompt.append({"role": "user", "content": options.prompt})
        interaction = Interaction(prompt, options.completion or "", options.followup)
        unrelated = neutral_followup(options.followup)
    elif options.source == "-":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "standard-input.json")
            path.write_bytes(sys.stdin.buffer.read())
            interaction, unrelated = _select(options, path)
    else:
        interaction, unrelated = _select(options, options.source)
    if options.no_unrelated:
        return interaction, None
    return interaction, unrelated if options.unrelated is None else options.unrelated


def _select(options: argparse.Namespace, source: str | Path) -> tuple[Interaction, str]:
    """The interaction that --index or --id name, and an unrelated follow-up of the same source."""

    def interactions() -> Iterator[Interaction]:
        for conversation in load_conversations(source):
            yield from extract_interactions(conversation, max_history_messages=options.max_history_messages)

    count, index = 0, options.index or 0
    for count, item in enumerate(interactions(), 1):
        if (count - 1 == index) if options.id is None else options.id in (item.id, item.conversation_id):
            break
    else:
        what = f"index {index}" if options.id is None else f"id {options.id!r}"
        raise ValueError(f"{options.source}: no interaction with {what} among the {count} there")
    if options.followup is not None:
        item = replace(item, followup=options.followup)
    if options.no_unrelated or options.unrelated is not None:
        return item, NEUTRAL_FOLLOWUP
    return item, choose_unrelated(interactions(), item)


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of the model options."""
    from transformers.utils.logging import disable_progress_bar

    from fastsdpo.modeling import load_model_and_tokenizer

    if options.quiet or not sys.stderr.isatty():
        disable_progress_bar()
    return load_model_and_tokenizer(**model_source(options), dtype=options.dtype, device=options.device)


def template_of(options: argparse.Namespace, model: PreTrainedModel | None = None) -> HindsightTemplate:
    """The template of --template, for a model: ``auto`` goes by its size (None: as for a small one).

    Raises:
        ValueError: neither a name nor a text with ``{o}``.
    """
    weights = 0 if model is None else sum(parameter.numel() for parameter in model.parameters())
    return HindsightTemplate.parse(choose_template(options.template, weights))


def write_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict], options: argparse.Namespace
) -> tuple[str, str]:
    """An answer drawn from the model, as on-policy data are, and a note that says so.

    Raises:
        ValueError: the model said nothing but reasoning or control tokens.
    """
    from fastsdpo.data import InteractionTokenizer
    from fastsdpo.online.sampling import generate

    tokenize = InteractionTokenizer(tokenizer, "note", max_prompt_length=None)
    ends = tokenize.end_ids(model)
    start = tokenize.generation_prompt(prompt)
    (sample,) = generate(
        model, [start], max_new_tokens=options.max_new_tokens, temperature=1.0, end_ids=ends, seed=str(options.seed)
    )
    answer = tokenize.said(sample.ids, start)
    if not answer:
        raise ValueError(
            f"the model said nothing in {options.max_new_tokens} tokens but reasoning or control "
            "tokens; raise --max-new-tokens or give --completion"
        )
    ended = "" if sample.ids[-1] in ends else f", stopped after {options.max_new_tokens} tokens"
    return answer, f"The model wrote this answer itself (seed {options.seed}{ended})."
