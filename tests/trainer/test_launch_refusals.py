"""Launches that cannot work are refused by name, with what to use instead, before weights are loaded."""

import re
from types import SimpleNamespace

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers import AutoModelForCausalLM

from fastsdpo.commands import train
from fastsdpo.trainer import launch
from tests.trainer.launching import Variant, arguments

FSDP = {"ACCELERATE_USE_FSDP": "true"}
FORMS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
INSTEAD = "FSDP2 or DeepSpeed ZeRO-3"
# Environment, further arguments, what is said.
REFUSED = {
    "tensor": ({**FORMS, "PARALLELISM_CONFIG_TP_SIZE": "2"}, [], f"tensor parallelism (.*TP_SIZE=2).*{INSTEAD}"),
    "context": ({**FORMS, "PARALLELISM_CONFIG_CP_SIZE": "2"}, [], "context parallelism .*--ulysses"),
    "sequence": ({**FORMS, "PARALLELISM_CONFIG_SP_SIZE": "4"}, [], "sequence parallelism.*--ulysses"),
    "replicas": ({**FORMS, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, [], "HSDP"),
    "pipeline": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], f"pipeline parallelism.*{INSTEAD}"),
    "fsdp1": ({**FSDP, "FSDP_VERSION": "1"}, [], "FSDP1 .*fsdp_version: 2"),
    "fsdp1 by default": (FSDP, [], "FSDP1 .*fsdp_version: 2"),
    "checkpoints beside": ({}, ["--set", "async_checkpoints=true"], "async_checkpoints must be False without FSDP2"),
    "sums of each pass": ({}, ["--set", "sync_each_pass=true"], "sync_each_pass must be False without FSDP2"),
    "deepspeed beside --cpu": (DEEPSPEED, [], "--cpu .*must be left out beside a DeepSpeed.*DS_ACCELERATOR=cpu"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    folder = tmp_path_factory.mktemp("refused")
    lab.save(folder / "tied")
    lab.write_rows(folder / "data.jsonl", lab.make_interactions(2))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_the_command(place, tmp_path, capsys, monkeypatch, name):
    environment, more, message = REFUSED[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    assert train.main(arguments(place, tmp_path / "out", Variant(more))) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_fsdp_without_a_gpu(place, tmp_path, capsys, monkeypatch):
    """accelerate leaves FSDP out on a CPU; each process would hold all."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert train.main(arguments(place, tmp_path / "out", Variant([]))) == 1
    assert "FSDP must run on GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, NotImplementedError, "context parallelism"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, NotImplementedError, "FSDP1 .*set version to 2"),
    ],
)
def test_settings(tmp_path, lab, settings, error, message):
    with pytest.raises(error, match=message):
        lab.make_config(tmp_path, **settings)


GATHERED = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, {}, NotImplementedError, "tensor parallelism"),
        ({"sequence_parallel_size": 2}, {}, NotImplementedError, "sequence parallelism"),
        ({"pipeline": {"stages": 2}}, {}, NotImplementedError, "pipeline parallelism"),
        ({"zero_optimization": {"stage": 3}}, {}, ValueError, "zero3_save_16bit_model: true"),
        ({}, {"non_finite": "skip"}, NotImplementedError, "use 'stop'"),
        ({}, {"weight_update": "stochastic_rounding"}, NotImplementedError, "use 'auto'"),
        ({"zero_optimization": GATHERED}, {"dtype": "bfloat16"}, ValueError, "add --bf16"),
    ],
)
def test_deepspeed_s_settings(tmp_path, lab, monkeypatch, config, settings, error, message):
    """Of the plugin that accelerate makes of a configuration; the package itself need not be there."""
    args = lab.make_config(tmp_path, **settings)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args.use_cpu, args.deepspeed_plugin = False, SimpleNamespace(deepspeed_config=config)
    with pytest.raises(error, match=message):
        launch.check_deepspeed(args)


def test_a_checkpoint_of_another_number_of_deepspeed_s_processes(tmp_path, lab):
    part = tmp_path / "checkpoint-2" / "global_step2"
    part.mkdir(parents=True)
    for rank in range(2):
        (part / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (part.parent / "trainer_state.json").write_text("{}", "utf-8")
    trainer = lab.make_trainer(tmp_path / "out")
    trainer.check_checkpoint(part.parent)  # without DeepSpeed nothing reads them
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"written by 2 processes of DeepSpeed.* got 1"):
        trainer.check_checkpoint(part.parent)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"hf_device_map": {"model.layers.0": 0, "model.layers.1": 1}}, "several devices .*leave device_map out"),
        ({"hf_device_map": {"model": 0, "lm_head": "disk"}}, "several devices"),
        ({"_tp_size": 2}, "tensor parallelism .*tp_plan"),
    ],
)
def test_a_model_that_is_divided_already(tmp_path, lab, attributes, message):
    model = lab.make_model()
    for name, value in attributes.items():
        setattr(model, name, value)
    with pytest.raises(NotImplementedError, match=message):
        lab.make_trainer(tmp_path, model=model)
