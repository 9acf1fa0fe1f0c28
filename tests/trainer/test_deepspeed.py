"""`accelerate launch` with DeepSpeed ZeRO-2 and ZeRO-3 trains and saves what one plain process does.

accelerate starts one process of DeepSpeed on a CPU (DS_ACCELERATOR=cpu); two are in test_deepspeed_loop.py.
"""

import pytest

from tests.trainer.launching import accelerate, compare, make_place, names, runs, torchrun, worker

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

# DeepSpeed has a float32 master of its own; under ZeRO-3 other teachers would need whole weights.
NAMES = {
    "zero2": names("stochastic", "master"),
    "zero3": names("stochastic", "master", "resumed_ema", "best_ema", "reference", "trust_region", "lora_ema"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    place = make_place(tmp_path_factory.mktemp("deepspeed"), lab)
    torchrun(1, *worker("plain"), runs(place, "plain", NAMES["zero2"]))
    return place


@pytest.fixture(scope="module")
def launched(place):
    """Of a stage, the variants trained in one launch; once."""
    done = set()

    def launch(stage):
        if stage not in done:
            done.add(stage)
            arguments = runs(place, stage, NAMES[stage], cpu=False)
            accelerate(f"deepspeed_{stage}", 1, *worker("deepspeed"), arguments, DS_ACCELERATOR="cpu")

    return launch


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in NAMES for name in NAMES[stage]])
def test_one_process(place, launched, lab, stage, name):
    launched(stage)
    compare(place, f"{stage}1-{name}", name, lab)
