"""`fastsdpo train` whose second process dies in the second step. See test_faults.

Usage: dying_worker.py raise|kill ARGUMENTS...   (started by torchrun; DYING_PIDS is a folder)
"""

import os
import signal
import sys
import traceback
from pathlib import Path

from fastsdpo import SDPOTrainer
from fastsdpo.cli import main

step = SDPOTrainer.training_step


def work(how: str, *arguments: str) -> int:
    def training_step(trainer, *given, **options):
        if trainer.state.global_step == 1 and trainer.args.process_index == 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the memory of this worker is broken")
        return step(trainer, *given, **options)

    Path(os.environ["DYING_PIDS"], f"pid-{os.getpid()}").touch()
    SDPOTrainer.training_step = training_step
    try:
        return main(["train", *arguments])
    except BaseException:
        # Python prints it at a process's end; torchrun's agent prints one, which may be that of the other process.
        traceback.print_exc()
        raise


def launch(how: str, *arguments: str) -> int:
    """As `torchrun --nproc-per-node 2` starts this file, by its own agent, but as forks of this process."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["DYING_PIDS"] = os.getcwd()
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "dying"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, start_method="fork", **place)
    try:
        elastic_launch(config, work)(how, *arguments)
    except ChildFailedError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:]))
