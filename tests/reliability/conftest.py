"""Counts of cases, their results file, and commands on tiny models that can be killed.

With ``FASTSDPO_LONG=1`` (`make fuzz`) every test tries its long count of cases. With ``FASTSDPO_RESULTS=FILE.json``
the numbers of cases tried, faults injected, cases survived and cases lost are written to that file.
"""

import json
import multiprocessing
import os
import platform
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.forked import process
from tests.reliability.runner import serve
from tests.trainer.conftest import lab as lab

LONG = os.environ.get("FASTSDPO_LONG") == "1"


@pytest.fixture(scope="session")
def count():
    """count(short, long): how many cases to try."""
    return lambda short, long: long if LONG else short


class Results:
    """What was tried, by test: ``add`` before the test asserts that nothing was lost."""

    def __init__(self, path):
        self.path = None if path is None else Path(path)

    def add(self, name, *, tried, faults=0, survived=None, lost=0, **figures):
        """Keeps the counts of one kind of case; ``figures`` are whatever else was measured."""
        if self.path is None:
            return
        found = {"rows": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text("utf-8"))
        import transformers

        found["rows"][name] = {
            "tried": tried,
            "faults": faults,
            "survived": tried - lost if survived is None else survived,
            "lost": lost,
            "figures": figures,
            "command": os.environ.get("FASTSDPO_COMMAND", "pytest"),
            "date": time.strftime("%Y-%m-%d"),
        }
        found["machine"] = {"python": platform.python_version(), "torch": torch.__version__}
        found["machine"] |= {"transformers": transformers.__version__, "cores": os.cpu_count()}
        found["machine"]["system"] = platform.system()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")


@pytest.fixture(scope="session")
def results():
    return Results(os.environ.get("FASTSDPO_RESULTS"))


class Runner:
    """Commands in processes of their own; see runner.py."""

    def __init__(self):
        self.jobs, theirs = multiprocessing.Pipe()
        self.process = process(serve, theirs)
        self.process.start()
        theirs.close()

    def __call__(self, folder, argv, *, send=signal.SIGKILL, after=None, **fault):
        """Runs a command in a folder.

        Args:
            send, after: the signal to send to it so many seconds after its start.
            fault: of the job; see runner.py.

        Returns:
            its status (negative: the signal that ended it), its log and its number of events on files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log"
        Path(f"{log}.events").unlink(missing_ok=True)
        job = {"argv": [str(part) for part in argv], "cwd": str(folder), "log": str(log), **fault}
        self.jobs.send(job)
        pid, started = self.jobs.recv(), time.perf_counter()
        if after is not None and not self.jobs.poll(after):
            os.kill(pid, send)
        status = self.jobs.recv()
        seconds, counted = time.perf_counter() - started, Path(f"{log}.events")
        events = int(counted.read_text()) if counted.exists() else None
        return SimpleNamespace(status=status, log=log.read_text("utf-8"), seconds=seconds, events=events)

    def close(self):
        self.jobs.close()
        self.process.join(60)


@pytest.fixture(scope="session")
def runner():
    running = Runner()
    yield running
    running.close()


@pytest.fixture(scope="session")
def commands(lab, tmp_path_factory):
    """The arguments of `prepare`, `train` and `online` on tiny inputs; outputs are ``out*``."""
    place = tmp_path_factory.mktemp("inputs")
    interactions = lab.make_interactions(6) + lab.make_interactions(3, seed=7)
    lab.make_place(place, interactions[:12], interactions[12:])
    (place / "prompts.txt").write_text("".join(f"w{i} w{i + 1} w{i + 2}\n" for i in range(24)))
    (place / "held_out.txt").write_text("w1 w2\nw3 w4\nw5\n")
    with open(place / "conversations.jsonl", "w") as file:
        for number in range(12_000 if LONG else 6_000):
            words = lab.WORDS[number % 50 :][:5]
            roles = ("user", "assistant") * 3
            messages = [{"role": role, "content": f"{number} {word}"} for role, word in zip(roles, words)]
            file.write(json.dumps({"id": f"c{number}", "messages": messages}) + "\n")
            if number % 1000 == 500:
                file.write('{"messages": [\n')
    shared = f"--model {place}/model -o out --cpu --batch-size 4 --save-steps 1 --logging-steps 1 --resume".split()
    shared += ["--learning-rate", "1e-3", "--set", "dataloader_pin_memory=false", "--template", lab.TEMPLATE]
    measures = ("--set=measure_answers=1", "--set=measure_tokens=4")  # of the held-out interactions: few
    online = f"--rule max_words=3 --wish w5 --eval-prompts {place}/held_out.txt --max-new-tokens 6 "
    online += "--max-steps 5 --updates-per-batch 2 --eval-steps 2"
    prepare = "-o out.jsonl --eval-fraction 0.1 --preset none"
    return {
        "prepare": ["prepare", place / "conversations.jsonl", *prepare.split()],
        "train": ["train", place / "data.jsonl", *shared, *measures, "--teacher", "ema", "--epochs", 2],
        "online": ["online", place / "prompts.txt", *shared, *online.split()],
    }


# What depends on time, or is transformers' account of one process.
CLOCKS = ("seconds", "time", "per_second", "data_wait", "peak_memory", "train_loss", "stateful_callbacks")


def without_clocks(value):
    """A report without `CLOCKS`."""
    if isinstance(value, dict):
        return {
            key: without_clocks(inner) for key, inner in value.items() if not any(clock in key for clock in CLOCKS)
        }
    return [without_clocks(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def outcome():
    """What a command left in its folder, as it has to be again: contents by name."""

    def read(folder):
        found = {}
        for path in sorted(folder.glob("out*/**/*")) + sorted(folder.glob("out*")):
            name = str(path.relative_to(folder))
            if path.is_dir() or path.name in ("checksums.json", "report.png"):
                continue
            if path.name in ("report.json", "before.json", "trainer_state.json"):
                found[name] = without_clocks(json.loads(path.read_text("utf-8")))
            elif path.name == "out.report.json":
                report = json.loads(path.read_text("utf-8"))
                for key in ("output", "eval_output"):
                    report[key] = Path(report[key]).name
                report["settings"].pop("outputs")
                found[name] = report
            else:
                found[name] = path.read_bytes()
        return found

    return read
