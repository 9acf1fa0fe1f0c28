"""`python -m fastsdpo.train`: the command `fastsdpo train`, for launchers that start a module.

    torchrun --nproc-per-node 2 -m fastsdpo.train interactions.jsonl --model MODEL -o runs/first

The run itself, in order, is `fastsdpo.commands.train_run.train`.
"""

import argparse
import sys

from fastsdpo.commands import options
from fastsdpo.commands.paths import held_out as held_out
from fastsdpo.commands.run import load as load
from fastsdpo.commands.train import build_parser as build_parser
from fastsdpo.commands.train import main as main
from fastsdpo.trainer import SDPOConfig


def read_config(parsed: argparse.Namespace) -> SDPOConfig:
    """The settings of the command's options; raises ValueError where one is unknown or out of range."""
    return options.read_config(parsed, SDPOConfig)


if __name__ == "__main__":
    sys.exit(main())
