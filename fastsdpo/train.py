"""`python -m fastsdpo.train`: the command `fastsdpo train`, for launchers that start a module.

    torchrun --nproc-per-node 2 -m fastsdpo.train interactions.jsonl --model MODEL -o runs/first

The run itself, in order, is `fastsdpo.commands.train.train`.
"""

import sys

from fastsdpo.commands.train import build_parser as build_parser
from fastsdpo.commands.train import held_out as held_out
from fastsdpo.commands.train import load as load
from fastsdpo.commands.train import main as main
from fastsdpo.commands.train import read_config as read_config

if __name__ == "__main__":
    sys.exit(main())
