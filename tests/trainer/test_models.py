"""What single families of models ask for."""

import logging

import pytest
import torch
import transformers

from fastsdpo.trainer.pack_table import PackTable
from fastsdpo.trainer.report import dry_run_report
from tests.words import SHAPE


def tiny(kind, **changes):
    """A configuration of a class, or its settings (dict), with the vocabulary of the tests' tokenizer."""
    return kind(**{"vocab_size": 68, "max_position_embeddings": 512, **SHAPE, **changes})


def changing_with_length(lab, kind, limit):
    """A model that does something else in a pass over more than ``limit`` tokens."""
    if kind == "keep_window_size":
        torch.manual_seed(0)
        config = tiny(transformers.DogeConfig, pad_token_id=None, keep_window_size=limit)
        model = transformers.DogeForCausalLM(config)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.A)  # 0 at first: all scores are equal
        return model
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        return lab.make_model(max_position_embeddings=limit, rope_parameters=rope)
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": limit}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    kind = transformers.Phi3Config
    return transformers.Phi3ForCausalLM(tiny(kind, original_max_position_embeddings=limit, rope_parameters=rope))


@pytest.fixture(scope="module")
def long_data(tmp_path_factory, lab):
    """Interactions, and a length that one of them exceeds."""
    interactions = lab.make_interactions(2, turns=4)
    made = lab.make_trainer(tmp_path_factory.mktemp("long"), interactions=interactions)
    prompt, teacher, completion = made.train_dataset.lengths().T
    longest = sorted((torch.maximum(prompt, teacher) + completion).tolist())
    assert longest[-2] + 1 < longest[-1] and longest[-2] > 60
    return interactions, longest[-2] + 1


@pytest.mark.parametrize("settings", [{}, {"teacher": "ema", "max_tokens_per_pack": 200}])
@pytest.mark.parametrize("kind", ["longrope", "dynamic", "keep_window_size"])
def test_a_long_interaction_runs_alone(tmp_path, lab, long_data, caplog, kind, settings):
    """Where it would change the rotary embeddings of those that it shares a pass with."""
    interactions, limit = long_data
    caplog.set_level(logging.WARNING, logger="fastsdpo.trainer")  # a quiet command raises it
    found, computed = {}, []

    def count(_module, args, _output):
        computed.append(args[0].numel())

    for sharing in ("off", "auto"):
        computed.clear()
        caplog.clear()
        model, steps = changing_with_length(lab, kind, limit), {"per_device_train_batch_size": 8, "max_steps": 2}
        made = lab.make_trainer(tmp_path, model=model, interactions=interactions, sharing=sharing, **steps, **settings)
        items = [made.train_dataset[index] for index in range(8)]
        longest = [len(i.teacher_prompt_ids) + len(i.completion_ids) for i in items]
        packs = made.learner.packs(items)
        if sharing == "auto":
            assert made.sharing == "conversation"
            assert packs[-1] == [items[longest.index(max(longest))]]
            assert sum(map(len, packs)) == 8 and len(packs[0]) > 1
        made.create_optimizer()
        hook = made.model.get_input_embeddings().register_forward_hook(count)
        counted = []
        for pack in packs:
            counted.append(made.run_pass(made.model, pack, 8)[1].computed_tokens)
        hook.remove()
        assert sum(computed) == sum(counted)
        made.training_step(made.model, {"interactions": items}, torch.tensor(8))
        gradients = {name: p.grad.clone() for name, p in made.model.named_parameters()}
        made.model.zero_grad()
        made.train()
        losses = lab.losses_of(made)
        said = [r.message for r in caplog.records if "run alone, and their prefixes" in r.message]
        found[sharing] = losses, gradients, said, sum(computed)
    assert found["auto"][0][0] == pytest.approx(found["off"][0][0], rel=1e-5)
    for name, gradient in found["off"][1].items():
        assert (found["auto"][1][name] - gradient).norm() < 1e-4 * gradient.norm(), name
    assert not found["off"][2] and len(found["auto"][2]) == 1
    assert f"a sequence of more than {limit} tokens run alone" in found["auto"][2][0]
    assert found["auto"][3] < 0.9 * found["off"][3]


def test_the_dry_run_counts_a_long_interaction_alone(tmp_path, lab, long_data):
    interactions, limit = long_data
    model = changing_with_length(lab, "longrope", limit)
    made = lab.make_trainer(tmp_path, model=model, interactions=interactions, per_device_train_batch_size=8)
    items = [made.train_dataset[index] for index in range(8)]
    tokens = 0
    for pack in made.learner.packs(items):
        tokens += made.run_pass(made.model, pack, 8)[1].computed_tokens
    table = PackTable(made.model, made.args, made.train_dataset, made.sharing)
    report = dry_run_report(made.model, made.args, made.train_dataset, None, table, 1)
    assert f"sharing conversation: {tokens:,} of " in report and "in 2 passes of" in report


@pytest.mark.parametrize("held_out", [False, True])
def test_a_named_sharing_that_does_not_fit_the_data_is_refused(tmp_path, lab, long_data, held_out):
    interactions, limit = long_data
    short = lab.make_interactions(1, seed=5)
    data = (
        {"interactions": short, "eval_dataset": {"one": short, "two": interactions}, "allow_leaks": True}
        if held_out
        else {"interactions": interactions}
    )
    with pytest.raises(NotImplementedError, match="is not possible for 1 of 8 interactions") as error:
        lab.make_trainer(tmp_path, model=changing_with_length(lab, "longrope", limit), sharing="interaction", **data)
    assert f"longrope rotary embeddings change beyond {limit} positions" in str(error.value)


@pytest.mark.parametrize("sharing", ["auto", "conversation"])
def test_long_interactions_that_come_later_run_alone(tmp_path, lab, long_data, caplog, sharing):
    """A held-out set that is given to evaluate: no error in the middle of a run."""
    caplog.set_level(logging.WARNING, logger="fastsdpo.trainer")
    interactions, limit = long_data
    losses = []
    for wanted in (sharing, "off"):
        model, short = changing_with_length(lab, "longrope", limit), lab.make_interactions(1, seed=5)
        made = lab.make_trainer(tmp_path, model=model, interactions=short, sharing=wanted)
        losses.append(made.evaluate(interactions)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert caplog.text.count("rotary embeddings change there") == 1


def small(kind, **changes):
    """A tiny model of a configuration class, for 64 positions."""
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 64, "initializer_range": 0.02, **changes}
    return transformers.AutoModelForCausalLM.from_config(tiny(kind, **sizes))


@pytest.mark.parametrize(
    ("kind", "changes", "table"),
    [
        (transformers.GPT2Config, {}, "wpe"),
        (transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}, "embed_positions"),
        (transformers.GPTJConfig, {"rotary_dim": 4}, "h.0.attn.embed_positions"),
        (transformers.MptConfig, {"max_seq_len": 64}, "max_seq_len"),
    ],
)
def test_a_table_of_positions_that_is_too_short_is_refused(tmp_path, lab, kind, changes, table):
    """Before the first step; beyond it lies an index error, on a GPU an assertion that ends the process."""
    model = small(kind, **changes)
    with pytest.raises(ValueError, match=rf"at most 64 tokens, as the model's table of positions \({table}\), but \d"):
        lab.make_trainer(tmp_path, model=model, interactions=lab.make_interactions(2, turns=6))
    short = lab.make_trainer(tmp_path, model=model, interactions=lab.make_interactions(2, turns=1), max_steps=1)
    short.train()
    longer = lab.make_trainer(tmp_path, interactions=lab.make_interactions(1, turns=6)).train_dataset
    with pytest.raises(ValueError, match="at most 64 tokens"):  # what comes later, of a user who reacts
        short.update([longer[len(longer) - 1]])


def test_llama_4_shares_its_chunks_and_its_temperature(tmp_path, lab):
    """Queries are scaled by their positions: here from the fifth token on, in the released models from 8,192."""
    text = dict(num_local_experts=2, head_dim=8, intermediate_size_mlp=48, attn_temperature_tuning=True, floor_scale=4)
    for layers in (None, ["full_attention"] * 2):
        found = []
        for sharing in ("conversation", "off"):
            model = small(transformers.Llama4TextConfig, **text, no_rope_layers=[1, 0], layer_types=layers)
            made = lab.make_trainer(tmp_path, model=model, max_steps=2, sharing=sharing)
            assert made.sharing == sharing
            items = [made.train_dataset[index] for index in range(4)]
            with torch.no_grad():
                found.append(made.run_pass(made.model, items, 4)[1])
        for name in ("student_logps", "teacher_logps"):
            torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=0, atol=5e-6)
        made.train()
        assert made.state.global_step == 2
