"""Options that several commands share, and the configuration that they make."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from fastsdpo.commands.parser import did_you_mean
from fastsdpo.settings import SDPOSettings

if TYPE_CHECKING:
    from fastsdpo.trainer.config import SDPOConfig

    Config = TypeVar("Config", bound=SDPOConfig)


def choose_device(options: argparse.Namespace) -> None:
    """Makes the GPU of ``--device cuda:N`` the only one that this process sees; before torch looks for any.

    Trainers would take the first one, and refuse to begin where they see several.

    Raises:
        ValueError: a launcher has started several processes, which have a GPU each.
    """
    device = getattr(options, "device", None) or ""
    if not re.fullmatch(r"cuda:\d+", device):
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device must be cpu or cuda where a launcher starts several processes, got {device}")
    number, seen = int(device[5:]), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] if seen is None else seen.split(",")[number : number + 1]
    if not names:
        raise ValueError(f"--device must be one of the GPUs in CUDA_VISIBLE_DEVICES={seen}, got {device}")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[0]
    options.device = "cuda"


def refuse(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises ValueError where one of the options or settings was given, since the command would not read it.

    Args:
        names: options without the dashes, or fields that ``--set`` names.
        reason: what comes after the name: "needs --held-out".
    """
    fields_set = {text.partition("=")[0] for text in getattr(options, "set", [])}
    for name in names:
        if name in options.given:
            raise ValueError(f"--{name} {reason}")
        if name in fields_set:
            raise ValueError(f"--set {name} {reason}")


def read_text(given: str) -> str:
    """The text, or what the file after an @ holds."""
    return Path(given[1:]).read_text("utf-8-sig").strip() if given.startswith("@") else given


def add_resume_options(run: argparse._ArgumentGroup) -> None:
    """Whether a folder that holds a run is used again."""
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="Continue from this checkpoint, or from the newest in the output folder. Where there is none, "
        "begin. Default: begin, and refuse a folder that holds a run.",
    )
    run.add_argument("--overwrite", action="store_true", help="Start again in a folder that holds a run.")
    add_quiet_option(run)


def add_quiet_option(group: Any) -> None:
    group.add_argument("--quiet", action="store_true", help="Print nothing but errors.")


def add_model_options(parser: argparse.ArgumentParser, lora: int | None = None) -> None:
    """Which model, from where, and what of it is trained; read by `fastsdpo.commands.run.load`.

    Args:
        lora: the rank where --lora is not given.
    """
    model = parser.add_argument_group("model")
    add_model_source_options(model, dtype=argparse.SUPPRESS)  # what is not given stays the preset's
    model.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="Train a new LoRA adapter of this rank on all linear layers. 0: all weights. Default: "
        f"{lora or 'all weights'}; where --model is an adapter, training continues with it.",
    )
    model.add_argument(
        "--lora-alpha", type=int, metavar="ALPHA", help="The scale of the adapter. Default: twice the rank."
    )
    model.add_argument(
        "--quantize",
        choices=("4bit", "8bit"),
        help="Pack the base model's weights with bitsandbytes, and train the adapter alone (QLoRA).",
    )


def add_model_source_options(
    model: argparse._ArgumentGroup, dtype: str | None = None, device: str | None = None
) -> None:
    """Which model and tokenizer, and from where; read by `model_source`, but for --dtype and --device.

    Args:
        dtype, device: where they are not given; None: as the model is loaded best.
    """
    model.add_argument(
        "--model", required=True, help="The model: a folder, a hub id or a GGUF file; or the folder of an adapter."
    )
    model.add_argument("--gguf-file", metavar="FILE", help="The GGUF file in that folder or repository.")
    model.add_argument("--tokenizer", help="The tokenizer: a folder, a hub id or a GGUF file. Default: the model's.")
    model.add_argument("--revision", help="The branch, tag or commit of a hub id. Default: main.")
    usual = "float32 on a CPU, else the checkpoint's" if dtype in (None, argparse.SUPPRESS) else dtype
    model.add_argument(
        "--dtype",
        help=f"The type of the weights: float32, bfloat16, float16, or auto: the checkpoint's. Default: {usual}.",
        default=dtype,
    )
    model.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="How transformers computes attention: eager, sdpa, and so on. Default: the model's.",
    )
    model.add_argument("--trust-remote-code", action="store_true", help="Run Python code that comes with the model.")
    add_device_option(model, device)


def add_device_option(group: Any, default: str | None = None) -> None:
    said = default or "a GPU where there is one"
    group.add_argument(
        "--device", default=default, help=f"Where to compute: cpu, cuda, cuda:1, and so on. Default: {said}."
    )
    group.add_argument(
        "--cpu", action="store_const", const="cpu", default=argparse.SUPPRESS, dest="device", help=argparse.SUPPRESS
    )


def model_source(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `fastsdpo.modeling.load_model_and_tokenizer` that `add_model_source_options` asks for."""
    if options.revision is not None and Path(options.model).exists():
        raise ValueError(f"--revision needs a hub id as --model, got the folder or file {options.model}")
    names = ("gguf_file", "tokenizer", "revision", "attn_implementation", "trust_remote_code")
    return {"name": options.model, **{name: getattr(options, name) for name in names}}


PRESET_HELP = (
    "A recipe, which the other options change. full: match the hindsight policy, by the reverse KL over the whole "
    "vocabulary. paper: the published recipe, own-answer hindsight, which is another objective (docs/objectives.md). "
    "paper-later: the recipe of the code published later, the top 20 tokens and the rest."
)
GROUPS = {
    "answers": "answers",
    "method": "method",
    "text": "text",
    "optimization": "optimization",
    "computation": "computation",
    "data": "data",
    "logs": "logs and checkpoints",
}


def add_setting_options(
    parser: argparse.ArgumentParser,
    presets: Iterable[str],
    config: type = SDPOSettings,
    *,
    changed: Mapping[str, Any] = MappingProxyType({}),
    without: Collection[str] = (),
) -> None:
    """A flag for each setting that has a group; read by `read_config`.

    Args:
        config: the class whose settings they are: `SDPOSettings` or `OnlineSDPOSettings`.
        changed: other defaults, of the command.
        without: groups and settings that the command has no use for.
    """
    wanted = {name: title for name, title in GROUPS.items() if name not in without}
    used = {item.metadata.get("group") for item in fields(config)}
    groups = {name: parser.add_argument_group(title) for name, title in wanted.items() if name in used}
    names = list(presets)
    about = PRESET_HELP + (" personal: ours, for one user's wish (docs/online.md)." if "personal" in names else "")
    groups["method"].add_argument("--preset", default="full", choices=names, help=about)
    for item in fields(config):
        group = groups.get(item.metadata.get("group", ""))
        if group is not None and item.name not in without:
            _add_setting(group, item, changed.get(item.name, item.default))
    compute = groups["computation"]
    compute.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Takes less memory and a third more time. Default: on, for models of a billion weights and more on a "
        "GPU.",
    )
    compute.add_argument(
        "--bf16",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Multiply in bfloat16 (autocast). Default: on, for GPUs that have it; --set bf16=false turns it off.",
    )
    compute.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Any other setting, those of transformers.TrainingArguments included. VALUE is JSON or text. Can be "
        "given several times.",
    )
    if "logs" in groups:
        _add_logs(groups["logs"])


def _add_setting(group: argparse._ArgumentGroup, item: Field, default: Any) -> None:
    more = item.metadata
    flag = more.get("flag") or f"--{item.name.replace('_', '-')}"
    kind = {"int": int, "float": float}.get(str(item.type).split(" | ")[0], str)
    nullable = "None" in str(item.type)

    def read(text: str) -> Any:
        return None if nullable and text == "none" else kind(text)

    read.__name__ = kind.__name__  # in argparse's errors
    said = "none" if default in (None, MISSING) else getattr(default, "value", default)
    group.add_argument(
        flag,
        dest=item.name,
        type=read,
        choices=more.get("choices"),
        metavar=None if "choices" in more else more.get("metavar", item.name.upper().split("_")[-1]),
        default=argparse.SUPPRESS,  # what is not given stays the preset's
        help=f"{more['help']} Default: {said}.".replace("None", "none").replace("%", "%%"),
    )


def _add_logs(logs: argparse._ArgumentGroup) -> None:
    own: dict[str, Any] = {"default": argparse.SUPPRESS}
    logs.add_argument(
        "--eval-steps",
        type=int,
        metavar="N",
        help="Measure the held-out loss every N steps. Default: after 5 minutes, then every 30 minutes.",
        **own,
    )
    logs.add_argument(
        "--save-steps",
        type=int,
        metavar="N",
        help="Write a checkpoint every N steps. Default: after 5 minutes, then every 30 minutes, and every 500 steps.",
        **own,
    )
    logs.add_argument(
        "--save-total-limit", type=int, metavar="N", help="How many checkpoints are kept. Default: 2.", **own
    )
    logs.add_argument(
        "--report-to",
        nargs="+",
        metavar="NAME",
        help="Where to report to: wandb, trackio, tensorboard, and others that transformers knows. Default: none.",
        **own,
    )


def add_push_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Upload the trained model, with its card, to this repository of the hub. A new repository is private.",
    )


# Settings that are read only where another one has this value; None: where it has any.
READ_WITH: dict[str, tuple[str, Any]] = {
    "ema_rate": ("teacher", "ema"),
    "trust_region_mix": ("teacher", "trust_region"),
    "add_tail": ("mode", "topk"),
    "generation_model": ("generation_url", None),
    "generation_sync": ("generation_url", None),
}


def check_read(asked: Mapping[str, Any], made: SDPOConfig) -> None:
    """Raises ValueError where a setting was given that the others leave without effect; says where --epochs is one.

    Args:
        asked: what was given.
        made: the configuration of it.
    """
    for name, (other, value) in READ_WITH.items():
        has = getattr(made, other, None)
        if name in asked and (has is None if value is None else has != value):
            got = f", got {other}={has}" if value else ""
            raise ValueError(f"{name} needs {other}={value or 'URL'}{got}")
    if asked.get("warmup_steps") and made.lr_scheduler_type == "constant":
        raise ValueError("warmup_steps needs a schedule that warms up: lr_scheduler_type=constant_with_warmup")
    for steps, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if steps in asked and getattr(made, strategy) != "steps":
            raise ValueError(f"{steps} needs --set {strategy}=steps, got {strategy}={getattr(made, strategy).value}")
    if made.max_steps > 0 and "num_train_epochs" in asked:
        logging.getLogger(__name__).info("--epochs is not read: --max-steps decides how long the run is")


def read_config(options: argparse.Namespace, config: type[Config], **settings: Any) -> Config:
    """The preset, changed by ``settings`` and then by the flags that were given.

    Args:
        options: of a parser with `add_setting_options`, whose flags are absent where not given.
        config: `SDPOConfig`, or a subclass with presets of the same kind.
        **settings: fields of ``config``.

    Raises:
        ValueError: a setting is unknown or out of range, or --device names none that can be used here.
    """
    import torch

    from fastsdpo.ops.backend import usable_device

    choose_device(options)
    names = {field.name for field in fields(config)}
    # Not push_to_hub: the Trainer's own uploads the whole output folder too, into a public repository of its name.
    flags = {*names, "gradient_checkpointing"} - {"push_to_hub"}
    given = {name: value for name, value in vars(options).items() if name in flags}
    fields_set = _read_set(options.set, config)
    for name in fields_set.keys() & given.keys():
        raise ValueError(f"{name}={given[name]} is given, and --set {name} too: leave one of them out")
    for steps, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if steps in given:
            given[strategy] = "steps"
    given |= fields_set
    asked = dict(given)
    if "gradient_checkpointing" in given:
        # transformers is renaming it; the new name where there is one.
        new = "activation_checkpointing"
        said = given.pop("gradient_checkpointing")
        given[new if new in names else "gradient_checkpointing"] = said
    device = None if options.device is None else usable_device(options.device)
    # transformers takes --bf16 for a wish for a GPU unless it is told.
    if (device is not None and device.type == "cpu") or (given.get("bf16") and not torch.cuda.is_available()):
        given["use_cpu"] = True
    defaults: dict[str, Any] = {
        "report_to": [],
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,  # the progress shown is our own
    }
    given = {**defaults, **settings, **given}
    if (
        device is not None
        and device.type == "cuda"
        and torch.cuda.device_count() > 1
        and "WORLD_SIZE" not in os.environ
    ):
        raise ValueError(f"--device must say which of the {torch.cuda.device_count()} GPUs, such as cuda:0, got cuda")
    made = config.preset(options.preset, output_dir=options.output, **given)
    assert isinstance(made, config)
    check_read(asked, made)
    if device is not None and made.device.type != device.type:
        raise ValueError(f"--device must be {made.device.type} or cpu for training here, got {device.type}")
    return made


def _read_set(texts: list[str], config: type) -> dict[str, Any]:
    given: dict[str, Any] = {}
    kinds = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(config)}
    for text in texts:
        name, equals, value = text.partition("=")
        if name.endswith("_token"):
            raise ValueError(f"--set {name}: tokens are read from the environment only (HF_TOKEN)")
        if name == "push_to_hub" or name.startswith("hub_"):
            raise ValueError(f"--set {name}: to upload the model give --push-to-hub OWNER/NAME")
        if not equals or name not in kinds:
            meant = did_you_mean(name, kinds.keys() - {name})
            raise ValueError(f"--set must be NAME=VALUE with a field of {config.__name__}, got {text!r}{meant}")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
        kind = kinds[name].split(" | ")[0]
        if isinstance(given[name], str) and kind in ("int", "float", "bool") and "str" not in kinds[name]:
            wanted = "true or false" if kind == "bool" else "a number"
            raise ValueError(f"--set {name} must be {wanted}, got {value!r}")
    return given
