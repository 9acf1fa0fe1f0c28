"""Bases of 4 and 8 bits below adapters, on a CPU: the doors of all integrations, and whole runs of trainers."""

import pytest

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make peers")
pytest.importorskip("peft")


from fastsdpo.integrations.trl import patch_trl
from fastsdpo.prefix import check_head, head_parameters
from tests.integrations import test_trl_sdpo, test_trl_trainers
from tests.integrations.test_adapters import compare, packed

# DoRA on layers of 8 bits fails in bitsandbytes 0.50 itself, in the model's second pass on a CPU.
IN_LAYERS = [(4, "lora"), (4, "dora"), (4, "ia3"), (4, "modules-to-save"), (8, "lora"), (8, "ia3")]
IN_LAYERS += [(8, "modules-to-save")]
ON_HEADS = [(bits, adapter) for bits in (4, 8) for adapter in ("lora-head", "lora-embeddings-head")]
PACKED = [*IN_LAYERS, *ON_HEADS, (4, "dora-head")]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "adapter"), PACKED)
def test_packed_weights(qwen2_folder, bits, adapter):
    # 8 bits: its layers round what they read by the outliers of all tokens of a pass, and its products are fp16.
    compare(packed(qwen2_folder, bits, adapter), 1e-5 if bits == 4 else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_is_refused_with_the_remedy(qwen2_folder, bits):
    model = packed(qwen2_folder, bits, llm_int8_skip_modules=["none"])
    with pytest.raises(NotImplementedError, match=rf"quantized \(Linear.*{bits}.*llm_int8_skip_modules=\['lm_head'\]"):
        head_parameters(model)
    right, reason = check_head(model)
    assert not right
    assert "llm_int8_skip_modules" in reason


def sdpo(model, folder, teacher, output):
    options = {"steps": 5, "teacher_model_kind": "live", **test_trl_sdpo.MODES["full-jsd"]}
    return test_trl_sdpo.make_trainer(folder, output, model=model, **options)


def sdft(model, folder, teacher, output):
    return test_trl_trainers.sdft(folder, teacher, output, model=model, distillation_mode="full_logits")


def distillation(model, folder, teacher, output):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    settings = {**test_trl_trainers.SETTINGS, "max_completion_length": 6, "beta": 0.5}
    return DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=DistillationConfig(output_dir=output, **settings),
        train_dataset=Dataset.from_dict({"prompt": test_trl_trainers.PROMPTS}),
        processing_class=test_trl_trainers.tokenizer_of(folder),
    )


def gkd(model, folder, teacher, output):
    return test_trl_trainers.gkd(folder, teacher, output, model=model, beta=0.5, lmbda=0.0)


def gold(model, folder, teacher, output):
    return test_trl_trainers.gold(folder, teacher, output, model=model, beta=0.5, lmbda=0.0)


def iw_opd(model, folder, teacher, output):
    return test_trl_trainers.iw_opd(folder, teacher, output, model=model, beta=0.5, **test_trl_trainers.JSD)


# The others refuse an adapter on the head, and cast what is trained beside packed layers to bfloat16: a head that is
# saved with the adapter then wants autocast, under which TRL's values are rounded.
WHOLE = {make: PACKED for make in (sdpo, sdft, iw_opd)}
TRAINERS = {
    **WHOLE,
    **{make: [one for one in IN_LAYERS if one[1] != "modules-to-save"] for make in (distillation, gkd, gold)},
}


def case(make, bits, adapter):
    return pytest.param(
        make, bits, adapter, marks=[] if (make, bits, adapter) == (gkd, 4, "lora") else pytest.mark.slow
    )


@pytest.mark.parametrize(
    ("make", "bits", "adapter"), [case(make, *one) for make in TRAINERS for one in TRAINERS[make]]
)
def test_runs_of_trl_trainers(make, bits, adapter, qwen2_folder, llama_folder, tmp_path):
    """Patched and not: losses, metrics and every gradient of five steps. The teacher of the others is packed too."""

    def run():
        model, teacher = packed(qwen2_folder, bits, adapter), packed(llama_folder, bits)
        return test_trl_trainers.run(make(model, qwen2_folder, teacher, str(tmp_path)))

    wanted = run()
    rounding = 0.0 if make in WHOLE else 2.0**-6  # bfloat16 has 2^-9 for each of the sums
    with patch_trl("hidden"):
        test_trl_trainers.assert_same(run(), wanted, rounding)


@pytest.mark.slow
def test_a_packed_head_in_a_trl_trainer(qwen2_folder, tmp_path, caplog):
    """By name refused with the remedy; else TRL's logits, and a warning that says why."""

    def run():
        model = packed(qwen2_folder, 4, "lora", llm_int8_skip_modules=["none"])
        return test_trl_trainers.run(gkd(model, qwen2_folder, packed(qwen2_folder, 4), str(tmp_path)))

    with patch_trl("hidden"), pytest.raises(NotImplementedError, match=r"llm_int8_skip_modules=\['lm_head'\]"):
        run()
    wanted = run()
    with patch_trl("auto"):
        test_trl_trainers.assert_same(run(), wanted, 2.0**-6)
    assert "losses from logits, not from hidden states: the model's head: " in caplog.text
