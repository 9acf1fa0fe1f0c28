"""Adapters inside the installed verl: its FSDP engine loads them, and its actor is its own teacher."""

import pytest

from tests.integrations import verl_on_cpu as lab

pytest.importorskip("verl", reason="needs verl: see docs/integrations/verl.md for the install")
from tests.integrations.test_adapters import make

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes():
    lab.use_cpu()
    with lab.one_process():
        yield


def engine_of(folder, adapter, output):
    make(folder, adapter).save_pretrained(output)
    return lab.make_engine(folder, lora_rank=4, lora_adapter_path=str(output))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_self_teacher(processes, adapter, qwen2_folder, tmp_path):
    """The loss and every gradient of the adapter's weights are a plain model's in float64."""
    from fastsdpo.integrations.verl_self_teacher import use_self_teacher

    engine = engine_of(qwen2_folder, adapter, tmp_path)
    with use_self_teacher("full", alpha=0.3):
        found = lab.run(engine, lab.make_batch(), lab.actor_loss())
    loss, grads = lab.defined(qwen2_folder, "full", alpha=0.3, adapter=str(tmp_path))
    assert grads.keys() == found[1].keys() and any(grad.any() for grad in grads.values())
    lab.assert_same(found, (loss, grads))
