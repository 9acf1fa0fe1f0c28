"""What a run leaves behind: lengths of its data before it, numbers and a plot after it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastsdpo.data.output import atomic_file
from fastsdpo.prefix import causal_lm
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.pack_table import PackTable
from fastsdpo.trainer.stream import InteractionStream


class Lengths(NamedTuple):
    """Tokens per interaction: median, 95th percentile, longest, sum."""

    median: int
    p95: int
    longest: int
    total: int


def length_table(dataset: InteractionDataset) -> dict[str, Lengths]:
    """Lengths in tokens of what student and teacher read and of the answers."""
    prompt, teacher, completion = dataset.lengths().T
    columns = {
        "student's prompt": prompt,
        "teacher's prompt": teacher,
        "answer": completion,
        "longest sequence": teacher + completion,
    }
    table = {}
    for name, values in columns.items():
        ordered = values.sort().values
        at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95)]
        table[name] = Lengths(int(at[0]), int(at[1]), int(ordered[-1]), int(ordered.sum()))
    return table


def dry_run_report(
    model: nn.Module, args: SDPOConfig, train: InteractionDataset, eval_: Any, table: PackTable, processes: int
) -> str:
    """What `fastsdpo train` says of its data: lengths, packs, steps.

    Args:
        processes: that train together.
    """
    lines = [f"{'tokens':<20} {'median':>8} {'95%':>8} {'longest':>8} {'sum':>12}"]
    lengths = length_table(train)
    for name, row in lengths.items():
        lines.append(f"{name:<20} {row.median:>8,} {row.p95:>8,} {row.longest:>8,} {row.total:>12,}")
    conversations = len(train.groups(True))
    held_out = "" if eval_ is None else f"; {len(eval_):,} held out"
    lines.append(
        f"{len(train):,} interactions of {conversations:,} conversations{held_out}; {len(train.dropped):,} left out"
    )
    lines.append(
        f"sharing {table.sharing}: {table.tokens:,} of {table.unshared:,} tokens are computed per epoch, "
        f"in {table.passes:,} passes"
        + (f" of at most {args.max_tokens_per_pack} tokens" if args.max_tokens_per_pack else "")
        + ("" if table.exact else ", projected from a sample")
    )
    lines.append(step_text(len(train), args, processes))
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    longest = lengths["longest sequence"].longest
    if limit and longest > limit:
        lines.append(f"WARNING: the longest sequence exceeds the model's {limit:,} positions")
    return "\n".join(lines)


def steps_per_run(interactions: int, args: SDPOConfig, processes: int | None = None) -> tuple[int, float]:
    """Optimizer steps of a run from its start, and the epochs that they are.

    Args:
        processes: None: those of ``args``.
    """
    processes = args.world_size if processes is None else processes
    batches = math.ceil(interactions / (args.per_device_train_batch_size * processes))
    epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    if args.max_steps > 0:
        return args.max_steps, args.max_steps / epoch
    return math.ceil(args.num_train_epochs * epoch), args.num_train_epochs


def step_text(interactions: int, args: SDPOConfig, processes: int | None = None) -> str:
    """Length of a run: "12 optimizer steps of 8 interactions, 0.2 epochs"."""
    processes = args.world_size if processes is None else processes
    steps, epochs = steps_per_run(interactions, args, processes)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes

    def counted(number: float, what: str, form: str) -> str:
        text = format(number, form)
        return f"{text} {what}" + ("" if text == "1" else "s")

    shared = f" over {processes} processes" if processes > 1 else ""
    return (
        f"{counted(steps, 'optimizer step', ',')} of {counted(size, 'interaction', ',')}{shared}, "
        f"{counted(epochs, 'epoch', '.3g')}"
    )


def stream_text(args: SDPOConfig, stream: InteractionStream) -> str:
    """What `fastsdpo train` says of a stream before it is read."""
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (
        f"a stream: {args.max_steps:,} optimizer steps of {size:,} interactions, drawn from a buffer of "
        f"{stream.buffer:,}; its lengths, packs and epochs are not known before it is read"
    )


def write_report(path: str | os.PathLike, report: Any) -> None:
    """Writes JSON; the file appears whole or not at all."""
    with atomic_file(Path(path)) as file:
        file.write(json.dumps(report, indent=1, default=str).encode() + b"\n")


def plot_history(history: list[dict[str, Any]], path: str | os.PathLike) -> bool:
    """Loss, signal and measures over the steps as PNG; False where matplotlib is not installed.

    What was measured before training is the point at step 0.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    measured = any("eval_measures/real_abs" in row for row in history)
    figure = Figure(figsize=(12, 6.5) if measured else (8.5, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2 if measured else 1, sharex=True, squeeze=False)
    loss, ratio = panels[:, 0]

    def series(key: str) -> tuple[list[float], list[float]]:
        rows = [row for row in history if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    few = "o-" if len(series("loss")[0]) < 12 else "-"  # a line of one point would not be seen
    loss.plot(*series("loss"), few, color="#4477aa", alpha=0.5, label="training")
    steps, values = series("eval_loss")
    if steps:
        loss.plot(steps, values, "o-", color="#cc3311", label="held out")
    loss.set_ylabel("loss (nats)")
    loss.set_title("how far the model is from its own answer with the follow-up in view", fontsize=9)
    loss.legend(frameon=False)
    steps, low = series("sdpo/log_ratio_p05")
    _, high = series("sdpo/log_ratio_p95")
    if steps:
        ratio.fill_between(steps, low, high, color="#4477aa", alpha=0.2, label="5% to 95%")
    ratio.plot(*series("sdpo/log_ratio_mean"), few, color="#4477aa", label="mean")
    ratio.plot(*series("sdpo/eos_log_ratio"), few, color="#ee7733", label="end of the answer")
    ratio.axhline(0, color="#999999", linewidth=0.8)
    ratio.set_ylabel("log-ratio, teacher - student (nats)")
    ratio.set_title("above 0: the follow-up asks for more of a token; below: for less", fontsize=9)
    ratio.set_xlabel("step")
    ratio.legend(frameon=False)
    if measured:
        _plot_measures(panels[0, 1], panels[1, 1], series)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)
    return True


def _plot_measures(listening: Any, margins: Any, series: Callable[[str], tuple[list[float], list[float]]]) -> None:
    """Whether the model still listens, and how far answers have moved from the logged one since the start."""
    for name, label, color in (("real", "real follow-up", "#4477aa"), ("unrelated", "unrelated", "#999999")):
        listening.plot(*series(f"eval_measures/{name}_abs"), "o-", color=color, label=label)
    listening.set_ylim(0, 1.05 * listening.get_ylim()[1])
    listening.set_ylabel("mean size of the log-ratio,\nheld out (nats)")
    listening.set_title("how much a follow-up moves the answer; both falling: the model forgets to listen", fontsize=9)
    shown = (
        ("margin", "next answer", "#228833"),
        ("stranger_margin", "a stranger's, as long", "#ee7733"),
        ("stranger_length_margin", "a stranger's, other length", "#ccbb44"),
        ("answer_logp", "log p of the logged answer", "#cc3311"),
    )
    for name, label, color in shown:
        steps, values = series(f"eval_measures/{name}")
        style = "o:" if name == "answer_logp" else "o-"
        margins.plot(steps, [value - values[0] for value in values], style, color=color, label=label)
    margins.axhline(0, color="#999999", linewidth=0.8)
    margins.set_ylabel("margin over the logged answer,\nchange since the start (nats)")
    margins.set_title("learning: the answer that came next rises above strangers' answers", fontsize=9)
    margins.set_xlabel("step")
    for axes in (listening, margins):
        axes.legend(frameon=False, fontsize=8)
