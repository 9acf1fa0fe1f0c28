"""Puts a LoRA adapter into its model's weights: `fastsdpo merge`.

    fastsdpo merge --model runs/first/model -o runs/first/merged

The result is a whole model in the dtype of the base model's checkpoint, for servers and converters that take
no adapters (docs/serving.md). The weights are those of PEFT's `merge_and_unload`.

Exit status: 0 done; 1 the adapter or its base model cannot be used, or the output cannot be written; 2 wrong
options.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastsdpo.commands.options import add_model_source_options, add_quiet_option, model_source
from fastsdpo.commands.parser import Parser
from fastsdpo.commands.paths import check_folder
from fastsdpo.commands.running import DONE, run_command


def build_parser() -> Parser:
    parser = Parser("merge", __doc__)
    run = parser.add_argument_group("run")
    run.add_argument("-o", "--output", required=True, metavar="FOLDER", help="The folder for the whole model.")
    parser.add_config_option(run)
    run.add_argument("--overwrite", action="store_true", help="Replace a model in that folder.")
    add_quiet_option(run)
    add_model_source_options(parser.add_argument_group("model"), dtype="auto", device="cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = build_parser()
    return run_command(parser, merge, parser.parse_args(argv))


def merge(options: argparse.Namespace) -> int:
    """Loads, merges and saves."""
    check_folder(options.output, allowed=True)
    from fastsdpo.modeling import check_name, is_adapter, load_model_and_tokenizer
    from fastsdpo.trainer.card import merged_card
    from fastsdpo.trainer.checkpoint_folders import check_output_folder, writing
    from fastsdpo.trainer.file_rights import open_as_umask

    output = Path(options.output)
    if (output / "adapter_config.json").exists():  # beside it whole weights would not be found
        raise ValueError(f"--output must not be the folder of an adapter, got {output}")
    if (output / "config.json").exists() and not options.overwrite:
        raise FileExistsError(f"{output} holds a model; pass --overwrite to replace it")
    if not is_adapter(options.model, options.revision):
        check_name(options.model)
        raise ValueError(f"--model must be the folder or hub id of an adapter, got {options.model}, which is none")
    loaded, tokenizer = load_model_and_tokenizer(
        **model_source(options), dtype=options.dtype, device=options.device, require_chat_template=False
    )
    model: Any = loaded
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(f"--model must be an adapter of weights to be merged, got {config.peft_type.value}")
    weights = sum(p.numel() * p.element_size() for p in model.get_base_model().parameters())
    check_output_folder(output, weights)
    whole = model.merge_and_unload()
    if not all(bool(p.isfinite().all()) for p in whole.parameters()):
        raise ValueError(
            f"--model must be an adapter of finite weights: merging {options.model} gives NaN or infinity"
        )
    with writing(str(output)):
        whole.save_pretrained(output)
        tokenizer.save_pretrained(output)
        card = merged_card(Path(options.model), config.base_model_name_or_path or "")
        (output / "README.md").write_text(card, encoding="utf-8")
        open_as_umask(output)
    if not options.quiet:
        print(f"merged into {output}: {whole.num_parameters():,} weights, {whole.dtype}".replace("torch.", ""))
    return DONE
