"""`fastsdpo train` whose second process dies in the second step. See test_faults.

Usage: dying_worker.py raise|kill ARGUMENTS...   (started by torchrun; DYING_PIDS is a folder)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fastsdpo import SDPOTrainer
from fastsdpo.cli import main

how, *arguments = sys.argv[1:]
step = SDPOTrainer.training_step


def training_step(trainer, *given, **options):
    if trainer.state.global_step == 1 and trainer.args.process_index == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the memory of this worker is broken")
    return step(trainer, *given, **options)


if __name__ == "__main__":
    Path(os.environ["DYING_PIDS"], f"pid-{os.getpid()}").touch()
    SDPOTrainer.training_step = training_step
    sys.exit(main(["train", *arguments]))
