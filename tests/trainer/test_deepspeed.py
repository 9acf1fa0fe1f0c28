"""`accelerate launch` with DeepSpeed ZeRO-2 and ZeRO-3 trains and saves what one plain process does.

accelerate starts one process of DeepSpeed on a CPU (DS_ACCELERATOR=cpu); two are in test_deepspeed_loop.py.
"""

from __future__ import annotations

import pytest

from tests.trainer.launching import VARIANTS, accelerate, compare, make_place, runs, torchrun, worker

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

NAMES = [name for name in VARIANTS if name not in ("stochastic", "master")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    place = make_place(tmp_path_factory.mktemp("deepspeed"), lab)
    torchrun(1, *worker("plain"), runs(place, "plain", NAMES))
    return place


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def engine(request, place):
    kind = request.param
    accelerate(f"deepspeed_{kind}", 1, *worker("deepspeed"), runs(place, kind, NAMES, cpu=False), DS_ACCELERATOR="cpu")
    return kind


@pytest.mark.parametrize("name", NAMES)
def test_one_process(place, engine, lab, name):
    compare(place, f"{engine}1-{name}", name, lab)
