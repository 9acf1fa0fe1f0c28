"""``use_liger_kernel``: Liger-Kernel's layers, in Triton's interpreter, under our loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from fastsdpo.prefix import checks
from fastsdpo.prefix.probe import ProbeItem, probe_ids

ROOT = Path(__file__).parents[2]


def cut(ids):
    return ids[:5], ids[:2] + ids[5:12], ids[12:]


def run(lab, folder, settings):
    """Losses, weights and sharing of the steps."""
    # The layers are interpreted, not the loss, which has tests of its own.
    settings = {"learning_rate": 1e-3, "logging_steps": 1, "max_steps": 3, "backend": "reference", **settings}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]) if settings.pop("peft", False) else None
    layers, interactions = 2, lab.make_interactions()
    with pytest.MonkeyPatch.context() as patch:
        if settings["max_steps"] == 1:  # interpreted, all takes long: one layer and conversation, a check on 20 tokens
            layers, interactions = 1, lab.make_interactions(1)
            patch.setattr(checks, "sharing_probe", lambda model, longest: [ProbeItem(*cut(probe_ids(model, 20)))])
        model = lab.make_model(num_hidden_layers=layers)
        trainer = lab.make_trainer(folder, model=model, interactions=interactions, peft_config=lora, **settings)
    trainer.train()
    losses = lab.losses_of(trainer)
    weights = [p.detach().double().flatten() for p in trainer.model.parameters()]
    sums = [float(w @ torch.arange(len(w)).cos().double()) for w in weights]
    return {"losses": losses, "weights": sums, "sharing": trainer.sharing}


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 1}, *(pytest.param(s, marks=pytest.mark.slow) for s in ({}, {"peft": True, "teacher": "ema"}))],
)
def test_same_run_with_ligers_layers(tmp_path, lab, settings):
    pytest.importorskip("liger_kernel")
    own = run(lab, tmp_path / "own", settings)
    command = [sys.executable, __file__, str(tmp_path / "liger"), json.dumps({"use_liger_kernel": True, **settings})]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    liger = json.loads(done.stdout.splitlines()[-1])
    assert liger["calls"] == ["LigerRMSNormFunction", "LigerRopeFunction", "LigerSiLUMulFunction"]
    assert own["sharing"] == liger["sharing"] == "conversation"
    assert liger["losses"] == pytest.approx(own["losses"], rel=1e-4)
    assert len(own["losses"]) == settings.get("max_steps", 3)
    assert liger["weights"] == pytest.approx(own["weights"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "use_liger_kernel must be False on a CPU: Liger-Kernel's layers are Triton kernels"),
        ({"liger_kernel_config": {"cross_entropy": True}}, r"liger_kernel_config\['cross_entropy'\] must be False"),
    ],
)
def test_refused(tmp_path, lab, monkeypatch, settings, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=words):
        lab.make_config(tmp_path, use_liger_kernel=True, **settings)


def test_models_without_layers_are_refused(tmp_path, lab, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = lab.make_model()
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="Liger-Kernel has no layers for 'unheard_of'"):
        lab.make_trainer(tmp_path, model=model, use_liger_kernel=True)


def as_compiled() -> None:
    """Gives the interpreter what a compiled launch has: floats as tensors, and libdevice's rsqrt."""
    import numpy as np
    import triton
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    def rsqrt(x):
        return 1.0 / tl.sqrt(x)

    rsqrt.__globals__["tl"] = tl
    rms_norm.rsqrt = triton.jit(rsqrt)

    own = interpreter._implicit_cvt

    def convert(value):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return own(value)

    interpreter._implicit_cvt = convert


def main(folder: str, given: str) -> None:
    from liger_kernel.ops import rms_norm, rope, swiglu

    from tests.trainer import conftest as lab

    as_compiled()
    calls = set()
    for function in (rms_norm.LigerRMSNormFunction, rope.LigerRopeFunction, swiglu.LigerSiLUMulFunction):
        backward = function.backward

        def counted(*args, name=function.__name__, backward=backward):
            calls.add(name)
            return backward(*args)

        function.backward = staticmethod(counted)
    found = run(lab, Path(folder), json.loads(given))
    print(json.dumps({**found, "calls": sorted(calls)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
