"""Worker scripts of tests as forks of one process that has imported what they need.

A process of its own takes 5 to 7 seconds of a core for the imports of a trainer, and most of these tests are of two or
three processes. The fork server has no thread and nothing of the test that starts it.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import pictures

IMPORTED = ["torch.distributed.fsdp", "pytest", "tests.preloaded"]


def _run(script: str, arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    pictures.draw_nothing()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def process(target: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """A fork of the server that will call a function; not started."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    return server.Process(target=target, args=arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(commands: Sequence[tuple[Sequence[object], Mapping[str, object]]], timeout: float = 300) -> None:
    """Runs scripts at the same time, as ``python SCRIPT ARGUMENTS...`` does with more in the environment.

    Args:
        commands: of each the script with its arguments, and the environment beside the test's own.

    Raises:
        AssertionError: one of them failed, or was not done after so many seconds, with what all have printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs, processes = [], []
        for number, ((script, *arguments), environment) in enumerate(commands):
            logs.append(Path(folder, str(number)))
            logs[-1].touch()
            texts = {**os.environ, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()}
            words = [str(argument) for argument in arguments]
            processes.append(process(_run, str(script), words, texts, str(logs[-1])))
        try:
            for one in processes:
                one.start()
            until = time.monotonic() + timeout
            for one in processes:
                one.join(max(0, until - time.monotonic()))
            codes = [one.exitcode for one in processes]
        finally:
            for one in processes:
                one.kill()
                one.join()
        assert codes == [0] * len(codes), f"{codes}\n" + "\n".join(log.read_text(errors="replace") for log in logs)
