"""`fastsdpo train` whose second process dies in the second step. See test_faults.

Usage: dying_worker.py raise|kill ARGUMENTS...   (started by torchrun; DYING_PIDS is a folder)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fastsdpo.train import main
from fastsdpo.trainer import SDPOTrainer

HOW = sys.argv[1]


class DyingTrainer(SDPOTrainer):
    def training_step(self, *arguments, **options):
        if self.state.global_step == 1 and self.args.process_index == 1:
            if HOW == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the memory of this worker is broken")
        return super().training_step(*arguments, **options)


if __name__ == "__main__":
    Path(os.environ["DYING_PIDS"], f"pid-{os.getpid()}").touch()
    import fastsdpo.trainer

    fastsdpo.trainer.SDPOTrainer = DyingTrainer
    sys.exit(main(sys.argv[2:]))
