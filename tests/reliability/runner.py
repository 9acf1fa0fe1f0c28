"""Runs fastsdpo commands, each in a process of its own that starts at once: a fork of what has all imported.

Receives a job, and sends its process's id when it runs, and its status when it has ended (negative for a signal).
A job:

    argv        of `fastsdpo`
    dying       instead: of dying_worker.launch
    cwd, log    its folder; the file that gets its standard output and error
    kill_at     at the n-th event on files under ``out*`` in its folder (opened, renamed, made,
                removed) it gets ``signal`` (SIGKILL where not given). 0: count them only
    no_network  an attempt to connect to anything ends the process with status 99
    file_limit  most bytes of a file (RLIMIT_FSIZE)
    disk        {"size": bytes, "read_only": bool}: ``out`` is a file system of that size (tmpfs in a
                mount namespace), filled from ``out`` before and copied to ``kept`` after. Status 77
                where this is not allowed here
"""

import ctypes
import os
import shutil
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from fastsdpo.cli import main
from tests import pictures
from tests.reliability import dying_worker

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 16384, 1 << 18
NOT_ALLOWED, CONNECTED = 77, 99

events = 0


def watch(job: dict) -> None:
    """The audit hook that counts, kills and forbids."""
    under = os.path.join(job["cwd"], "out")

    def hook(event: str, arguments: tuple) -> None:
        global events
        if job.get("no_network") and event == "socket.connect":
            os.write(2, f"connects to {arguments[1]}\n".encode())
            os._exit(CONNECTED)
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(under):
            return
        events += 1
        if events == job.get("kill_at"):
            os.kill(os.getpid(), job.get("signal", signal.SIGKILL))

    sys.addaudithook(hook)


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, target, kind, flags, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def small_disk(folder: str, size: int, read_only: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(CLONE_NEWNS) != 0:
            raise OSError("unshare")
        mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        shutil.rmtree(f"{folder}.before", ignore_errors=True)
        if os.path.exists(folder):
            shutil.copytree(folder, f"{folder}.before")
        os.makedirs(folder, exist_ok=True)
        mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode())
    except OSError:
        os._exit(NOT_ALLOWED)
    if os.path.exists(f"{folder}.before"):
        shutil.copytree(f"{folder}.before", folder, dirs_exist_ok=True)
    if read_only:
        mount(b"none", folder.encode(), b"tmpfs", MS_REMOUNT | MS_RDONLY, None)


def run(job: dict) -> int:
    os.chdir(job["cwd"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    disk = job.get("disk")
    if disk:
        small_disk(os.path.join(job["cwd"], "out"), disk["size"], disk["read_only"])
    if job.get("file_limit"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if "kill_at" in job or job.get("no_network"):
        watch(job)
    try:
        status = dying_worker.launch(*job["dying"]) if "dying" in job else main(job["argv"])
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    if disk:
        shutil.copytree("out", "kept")
    with open(job["log"] + ".events", "w") as file:
        file.write(str(events))
    return status


def serve(jobs: Connection) -> None:
    """Until the other end is closed."""
    pictures.draw_nothing()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            os._exit(run(job))
        jobs.send(pid)
        _, how = os.waitpid(pid, 0)
        jobs.send(os.waitstatus_to_exitcode(how))
