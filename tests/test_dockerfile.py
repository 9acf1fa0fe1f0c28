"""The Dockerfile's steps, one after the other, in a folder in the place of the image's root.

Not replayed: the base image, whose place a new environment of this Python takes; the step of apt; and the download of
the dependencies, which are those of the tests.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pages import ROOT


def steps():
    """``[(instruction, what follows it)]``."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


def copied(folder):
    """The build's context, as .dockerignore leaves it."""
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    names = [pattern.removeprefix("**/") for pattern in ignored]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a checkout")
    for name in tracked.stdout.splitlines():
        if not any(fnmatch.fnmatch(part, pattern) for part in Path(name).parts for pattern in names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


@pytest.mark.slow
def test_the_steps_end_in_an_image_whose_command_runs(tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PIP_NO_DEPS": "1", "PYTHONPATH": ""}
    source, place, entry, arguments = tmp_path / "source", tmp_path, [], []
    for instruction, rest in steps():
        if instruction == "FROM":
            assert re.fullmatch(r"python:3\.1\d-slim", rest), rest
        elif instruction == "COPY":
            assert rest == ". /source"
            copied(source)
        elif instruction == "RUN" and not rest.startswith("apt-get"):
            command = rest.replace("/source", str(source))
            done = subprocess.run(command, shell=True, cwd=place, env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        elif instruction == "WORKDIR":
            place = tmp_path / rest.lstrip("/")
            place.mkdir()
        elif instruction in ("ENTRYPOINT", "CMD"):
            entry, arguments = (
                (json.loads(rest), arguments) if instruction == "ENTRYPOINT" else (entry, json.loads(rest))
            )
        else:
            assert instruction == "RUN", f"not replayed: {instruction}"
    assert not source.exists()
    (site,) = {found.parents[1] for found in environment.rglob("fastsdpo/__init__.py")}
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    told = subprocess.run([*entry, *arguments], cwd=place, env=variables, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith("usage: fastsdpo"), told.stderr
    doctor = subprocess.run([*entry, "doctor"], cwd=place, env=variables, capture_output=True, text=True)
    assert doctor.returncode == 0 and "native: available" in doctor.stdout, doctor.stdout + doctor.stderr
