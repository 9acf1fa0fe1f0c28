"""The model card (README.md) of what a run saves: data, measures, settings, and how to load it."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsdpo.prefix import whole_size
from fastsdpo.settings import SDPOSettings
from fastsdpo.trainer.adapters import is_peft
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.stream import InteractionStream

if TYPE_CHECKING:
    from fastsdpo.trainer.checkpoints import CheckpointTrainer

CARD = "README.md"
LOADING = "## How to load"
PAPER = "[Aligning Language Models from User Interactions](https://arxiv.org/abs/2603.12273)"
NO_MEASURE = re.compile(r"eval_(runtime|.*_per_second|num_.*)|epoch|step|total_flos")


def write_card(trainer: CheckpointTrainer, folder: Path) -> None:
    """Writes the card of the trainer's model as it is now, in the place of PEFT's empty one."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapter = is_peft(model)
    base = model.active_peft_config.base_model_name_or_path if adapter else model.config._name_or_path
    sections = ["## Data", _table(_data(trainer)), "## Measures", _measures(trainer.state.log_history)]
    settings = {name: f"`{value}`" for name, value in _settings(trainer).items()}
    sections += ["## Settings", _table(settings)]
    text = card_text(str(base or ""), adapter, "\n\n".join(sections))
    (folder / CARD).write_text(text, encoding="utf-8")


def card_text(base: str, adapter: bool, sections: str, merged: bool = False) -> str:
    """The card.

    Args:
        base: the model that was trained: a hub id or a folder, whose path the card does not tell.
        sections: what stands between the first sentence and how to load it.
        merged: the weights hold an adapter that was trained.
    """
    hub_id = base if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and not Path(base).exists() else None
    name = hub_id or Path(base).name or "a model"
    metadata = [f"base_model: {hub_id}"] if hub_id else []
    metadata += [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    metadata += ["tags:", "- fastsdpo", "- sdpo", *(["- lora"] if adapter else [])]
    what = "An adapter for" if adapter else "With an adapter merged into its weights:" if merged else "A copy of"
    said = "" if hub_id else " (from a local folder)"
    intro = (
        f"{what} `{name}`{said}, trained on users' follow-up messages by SDPO, self-distillation policy optimization "
        f"({PAPER}): each answer is moved towards what the model would have said had it known the user's reply."
    )
    licence = (
        "No licence is stated: those of the base model and of the conversations apply. Add `license:` above once you "
        "have chosen one. The conversations may be remembered by the model; see to it that their users agree."
    )
    parts = [
        "\n".join(["---", *metadata, "---"]),
        f"# {name}, trained on user interactions",
        intro,
        sections,
        LOADING,
        _loading(name, adapter),
        "## Licence and use",
        licence,
        f"Made with {', '.join(_versions())}.",
    ]
    return "\n\n".join(parts) + "\n"


def merged_card(adapter_folder: Path, base: str) -> str:
    """The card of an adapter's model after merging: with what the adapter's own card says of its training."""
    try:
        text = (adapter_folder / CARD).read_text("utf-8")
    except OSError:
        text = ""
    start, end = text.find("## Data"), text.find(LOADING)
    sections = text[start:end].strip() if 0 <= start < end else "Its adapter has no card that says how it was trained."
    return card_text(base, False, sections, merged=True)


def _data(trainer: CheckpointTrainer) -> dict[str, str]:
    rows: dict[str, str] = {}
    for what, data in (("training", trainer.train_dataset), ("held out", trainer.eval_dataset)):
        if isinstance(data, InteractionDataset):
            conversations = len(data.groups(True))
            rows[what] = f"{len(data):,} interactions of {conversations:,} conversations"
            if data.dropped:
                rows[what] += f"; {len(data.dropped):,} left out (too long, or not to be tokenized)"
        elif isinstance(data, InteractionStream):
            rows[what] = f"{data.interactions:,} interactions, read as a stream"
            if data.left_out:
                rows[what] += f"; {data.left_out:,} left out (too long, or not to be tokenized)"
        elif data is not None and not isinstance(data, dict):
            rows[what] = f"{len(data):,} prompts"
    learned = getattr(trainer, "interactions", None)
    if isinstance(learned, int):
        rows["answers with a follow-up"] = f"{learned:,}"
    rows["optimizer steps"] = f"{trainer.state.global_step:,}"
    return rows


def _measures(history: list[dict[str, Any]]) -> str:
    """A table of held-out figures, the first and the last of them."""
    rows = [{k: v for k, v in row.items() if k.startswith("eval_") and not NO_MEASURE.match(k)} for row in history]
    at = [(row["step"], found) for row, found in zip(history, rows) if found]
    if not at:
        return "Nothing was measured: there was no held-out data, or no measurement yet."
    (first, before), (last, after) = at[0], at[-1]
    lines = [f"| held out | step {first} | step {last} |", "| --- | --- | --- |"]
    for name in sorted(after):  # a state that was read from a file has lost their order
        values = [found.get(name) for found in (before, after)]
        if all(isinstance(value, (int, float)) for value in values):
            lines.append(f"| {name.removeprefix('eval_')} | {values[0]:.4f} | {values[1]:.4f} |")
    note = (
        "A lower held-out loss shows that the model predicts itself with the follow-up better, not that its answers "
        "are better: compare those (`fastsdpo eval`)."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _settings(trainer: CheckpointTrainer) -> dict[str, Any]:
    args: Any = trainer.args
    names = [item.name for item in fields(SDPOSettings) if "group" in item.metadata]
    found = {name: getattr(args, name) for name in names if name not in ("token_cache", "tokenizer_workers")}
    found |= {name: getattr(args, name) for name in ("temperature", "is_clip", "weight_update", "weight_decay")}
    found["optim"] = getattr(args.optim, "value", args.optim)
    found["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    found["processes"] = args.world_size
    sizes = [(whole_size(p), p.requires_grad, p.dtype) for p in trainer.model.parameters()]
    found["trained weights"] = f"{sum(n for n, trained, _ in sizes if trained):,} of {sum(n for n, _, _ in sizes):,}"
    found["dtype"] = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, _, dtype in sizes}))
    return {name: value for name, value in found.items() if value is not None}


def _loading(name: str, adapter: bool) -> str:
    if adapter:
        code = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS")'
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS")'
        )
    code += '\ntokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS")'
    more = "fastsdpo chat --model PATH_OF_THIS -o chats/mine"
    if adapter:
        more += "\nfastsdpo merge --model PATH_OF_THIS -o merged    # whole weights, for servers without adapters"
        more += f"\nvllm serve {name} --enable-lora --lora-modules mine=PATH_OF_THIS"
    else:
        more += "\nvllm serve PATH_OF_THIS"
    return f"```python\n{code}\n```\n\n```bash\n{more}\n```"


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "| --- | --- |"]
    return "\n".join(
        lines + [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    )


def _versions() -> list[str]:
    found = []
    for name in ("fastsdpo", "torch", "transformers", "peft"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
