"""Options, errors and exit statuses that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from fastsdpo.trainer.config import SDPOConfig

    Config = TypeVar("Config", bound=SDPOConfig)

DONE, FAILED, NOT_FINITE, DEGENERATE = 0, 1, 3, 4
STOPPED = 128  # + the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM

# Shown as one sentence; any other error is a fault of this package and shows its traceback.
USER_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    ImportError,
    torch.OutOfMemoryError,
)


def run_command(
    name: str,
    run: Callable[[argparse.Namespace], int],
    options: argparse.Namespace,
    *,
    statuses: Mapping[type[Exception], int] = MappingProxyType({}),
    stopped: str = "stopped at once",
) -> int:
    """Runs a command and turns errors into one sentence on standard error and an exit status.

    Args:
        name: of the command.
        run: the command; it returns its exit status.
        options: what was given; ``quiet`` silences all logs but errors.
        statuses: errors of this command alone, with their exit statuses.
        stopped: said after Ctrl-C.

    Returns:
        the status of ``run``; 1 after one of `USER_ERRORS`, which the environment variable
        FASTSDPO_TRACEBACK=1 lets through; 130 after Ctrl-C.
    """
    logger = logging.getLogger("fastsdpo")
    level = logger.level
    logger.setLevel(logging.ERROR if options.quiet else logging.INFO)
    # Not on the root: what other packages show themselves would be shown twice.
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    # What peft asks of transformers is no news to the user.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        return run(options)
    except tuple(statuses) as error:
        status = next(status for kind, status in statuses.items() if isinstance(error, kind))
        said = str(error)
    except USER_ERRORS as error:
        if os.environ.get("FASTSDPO_TRACEBACK"):
            raise
        status, said = FAILED, describe_error(error)
    except KeyboardInterrupt:
        status, said = STOPPED + signal.SIGINT, stopped
    finally:
        logger.setLevel(level)
    print(f"fastsdpo {name}: {said}", file=sys.stderr)
    return status


def describe_error(error: Exception) -> str:
    """The error as a sentence; for a missing package, how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return f"needs the package {error.name!r}; install it with: pip install 'fastsdpo[train]'"
    return str(error)


def read_text(given: str) -> str:
    """The text, or what the file after an @ holds."""
    return Path(given[1:]).read_text("utf-8-sig").strip() if given.startswith("@") else given


def add_resume_options(run: argparse._ArgumentGroup) -> None:
    """Whether a folder that holds a run is used again."""
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, or from the output folder's newest; without one, begin",
    )
    run.add_argument("--overwrite", action="store_true", default=False, help="start anew in a folder that holds a run")
    run.add_argument("--quiet", action="store_true", default=False, help="print nothing but errors")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, from where, and what of it is trained; read by `fastsdpo.commands.run.load`."""
    model = parser.add_argument_group("model")
    add_model_source_options(model)
    model.add_argument(
        "--lora",
        type=int,
        default=None,
        metavar="RANK",
        help="train a new LoRA adapter of this rank on all linear layers",
    )
    model.add_argument("--lora-alpha", type=int, default=None, help="default: twice the rank")
    model.add_argument(
        "--quantize",
        choices=("4bit", "8bit"),
        default=None,
        help="pack the base model's weights with bitsandbytes and train the adapter alone (QLoRA)",
    )


def add_model_source_options(model: argparse._ArgumentGroup) -> None:
    """Which model and tokenizer, and from where; read by `model_source`. --dtype is the caller's to read."""
    model.add_argument("--model", required=True, help="folder, hub id or GGUF file, or an adapter")
    model.add_argument("--gguf-file", default=None, help="the GGUF file in that folder or repository")
    model.add_argument("--tokenizer", default=None, help="folder, hub id or GGUF file (default: the model's)")
    model.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    model.add_argument(
        "--dtype", help="of the weights: float32, bfloat16, auto (default: float32 on a CPU, else the checkpoint's)"
    )
    model.add_argument("--attn-implementation", default=None, help="eager, sdpa, ...")
    model.add_argument("--trust-remote-code", action="store_true", default=False)


def model_source(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `fastsdpo.modeling.load_model_and_tokenizer` that `add_model_source_options` asks for."""
    names = ("gguf_file", "tokenizer", "revision", "attn_implementation", "trust_remote_code")
    return {"name": options.model, **{name: getattr(options, name) for name in names}}


def add_setting_options(parser: argparse.ArgumentParser, presets: Collection[str]) -> None:
    """Flags named as the fields of `SDPOConfig` that they set; read by `read_config`."""
    _add_method(parser.add_argument_group("method"), presets)
    text = parser.add_argument_group("text")
    text.add_argument("--template", help="offline-v1, note, ..., or a text with {o}")
    text.add_argument("--max-prompt-length", type=int, metavar="TOKENS")
    text.add_argument("--max-completion-length", type=int, metavar="TOKENS")
    text.add_argument("--max-followup-length", type=int, metavar="TOKENS")
    text.add_argument(
        "--token-cache",
        type=lambda text: None if text == "none" else text,
        metavar="FOLDER",
        help="where the tokens of data files are kept for other processes and runs; none: nowhere (default: "
        "~/.cache/fastsdpo/tokens, for files of 32 MB and more)",
    )
    text.add_argument(
        "--tokenizer-workers", type=int, metavar="N", help="processes that tokenize a data file (default: by its size)"
    )
    _add_optimization(parser.add_argument_group("optimization"))

    compute = parser.add_argument_group("computation")
    compute.add_argument("--sharing", choices=("auto", "conversation", "interaction", "off"))
    compute.add_argument("--max-tokens-per-pack", type=int, metavar="TOKENS", help="of one forward pass")
    compute.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, a third more time (default: on a GPU for models of a billion weights and more)",
    )
    compute.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    compute.add_argument("--cpu", action="store_true", dest="use_cpu")

    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--logging-steps", type=int)
    logs.add_argument("--eval-steps", type=int)
    logs.add_argument("--save-steps", type=int)
    logs.add_argument("--save-total-limit", type=int)
    logs.add_argument("--report-to", nargs="+", help="wandb, tensorboard, ... (default: none)")
    logs.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of the configuration; the value is JSON or text",
    )


def _add_method(method: argparse._ArgumentGroup, presets: Collection[str]) -> None:
    method.add_argument(
        "--preset",
        default="exact",
        choices=list(presets),
        help="exact (default): reverse KL, summed over the whole vocabulary; paper: "
        "the published recipe, which is another objective (docs/objectives.md)"
        + ("; personal: ours for one user's wish (docs/online.md)" if "personal" in presets else ""),
    )
    method.add_argument(
        "--mode",
        choices=("full", "topk", "sampled_token"),
        help="the divergence over all tokens, over the likeliest, or the policy gradient of the answer's own tokens",
    )
    method.add_argument("--alpha", type=float, help="0 forward KL, 1 reverse KL, between JSD")
    method.add_argument("--topk", type=int)
    method.add_argument("--teacher", choices=("live", "ema", "frozen", "trust_region"))
    method.add_argument("--ema-rate", type=float)
    method.add_argument(
        "--guidance", type=float, metavar="G", help="how much a follow-up counts in the teacher (default: 1)"
    )
    method.add_argument("--neutral-followup", metavar="TEXT", help="one that says nothing; its effect is subtracted")
    method.add_argument("--reference-kl", type=float, help="times KL(student || initial model)")
    method.add_argument("--normalization", choices=("sequence", "token"))
    method.add_argument("--ignore-first-k", type=int, help="tokens of each answer")


def _add_optimization(steps: argparse._ArgumentGroup) -> None:
    steps.add_argument("--learning-rate", type=float)
    steps.add_argument("--epochs", type=float, dest="num_train_epochs")
    steps.add_argument("--max-steps", type=int)
    steps.add_argument(
        "--global-batch-size",
        type=int,
        metavar="N",
        help="interactions per step over all processes; --batch-size is then the most of one micro-batch",
    )
    steps.add_argument(
        "--batch-size",
        type=int,
        dest="per_device_train_batch_size",
        help="interactions per process and step, times --accumulate",
    )
    steps.add_argument("--accumulate", type=int, dest="gradient_accumulation_steps")
    steps.add_argument("--warmup", type=float, dest="warmup_steps", help="steps, or a share below 1")
    steps.add_argument("--schedule", dest="lr_scheduler_type", help="cosine, constant, linear, ...")
    steps.add_argument("--clip", type=float, dest="max_grad_norm", help="of the gradient's norm")
    steps.add_argument("--seed", type=int)


def read_config(options: argparse.Namespace, config: type[Config], **settings: Any) -> Config:
    """The preset, changed by ``settings`` and then by the flags that were given.

    Args:
        options: of a parser with `add_setting_options`, whose flags are absent where not given.
        config: `SDPOConfig`, or a subclass with presets of the same kind.
        **settings: fields of ``config``.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    names = {field.name for field in dataclasses.fields(config)}
    flags = {*names, "gradient_checkpointing"}
    given = {name: value for name, value in vars(options).items() if name in flags}
    for steps, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if steps in given:
            given[strategy] = "steps"
    for text in options.set:
        name, equals, value = text.partition("=")
        if name.endswith("_token"):
            raise ValueError(f"--set {name}: tokens are read from the environment only (HF_TOKEN)")
        if not equals or name not in names:
            raise ValueError(f"--set must be NAME=VALUE with a field of {config.__name__}, got {text!r}")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
    if "gradient_checkpointing" in given:
        # transformers is renaming it; the new name where there is one.
        new = "activation_checkpointing"
        said = given.pop("gradient_checkpointing")
        given[new if new in names else "gradient_checkpointing"] = said
    defaults: dict[str, Any] = {
        "report_to": [],
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,  # the progress shown is our own
    }
    given = {**defaults, **settings, **given}
    made = config.preset(options.preset, output_dir=options.output, **given)
    assert isinstance(made, config)
    return made
