"""Adapters inside the installed verl: its FSDP engine loads them, and its actor is its own teacher."""

import importlib
import warnings

import pytest
import torch

from tests.integrations import verl_on_cpu as lab

pytest.importorskip("verl", reason="needs verl: see docs/integrations/verl.md for the install")
from tests.integrations.test_adapters import make

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes():
    lab.use_cpu()
    with pytest.MonkeyPatch.context() as patch:
        from transformers.integrations import flash_attention

        # verl replaces it for the process
        patch.setattr(flash_attention, "_flash_attention_forward", flash_attention._flash_attention_forward)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # engines for which packages are missing
            importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["lora-head", "lora-embeddings-head", "dora-head", "modules-to-save"])
def test_adapters_that_verl_itself_does_not_run(processes, adapter, qwen2_folder, tmp_path):
    """Without anything of ours: FSDP2, as verl applies it, takes no adapters beside the layers."""
    with pytest.raises((RuntimeError, TypeError), match=r"mixed torch\.Tensor and DTensor|__class__ assignment"):
        lab.run(engine_of(qwen2_folder, adapter, tmp_path), lab.make_batch(), lab.actor_loss())
