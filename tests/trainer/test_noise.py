"""Noise in training mode: turned off for student and teacher, refused by name, or said."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PveraConfig, get_peft_model
from torch import nn

from tests.words import SHAPE

MORE = {"vocab_size": 68, "max_position_embeddings": 512}
SMALL = {"vocab_size": 68, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS = {"ffn_dim": 48, "max_position_embeddings": 512, "word_embed_proj_dim": 32}
GPT2 = {"vocab_size": 68, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
CONFIGS = {
    "seed_oss": lambda: transformers.SeedOssConfig(**SHAPE, **MORE, head_dim=8),  # 0.1 by default, in two places
    "granite": lambda: transformers.GraniteConfig(**SHAPE, **MORE, attention_dropout=0.1),
    "opt": lambda: transformers.OPTConfig(**SMALL, **POSITIONS, layerdrop=0.3, init_std=0.2),
    # Reads its rates from the configuration in every forward pass.
    "falcon": lambda: transformers.FalconConfig(
        **SMALL, hidden_dropout=0.1, attention_dropout=0.1, initializer_range=0.2
    ),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    # A mixture of experts with jitter in front of its router.
    "minimax": lambda: transformers.MiniMaxConfig(**SHAPE, **MORE, **EXPERTS, head_dim=8, router_jitter_noise=0.2),
}


def build(name):
    torch.manual_seed(0)
    if name == "lora_dropout":
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.2, init_lora_weights=False)
        return get_peft_model(build("granite"), config, autocast_adapter_dtype=False)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    return model if name == "minimax" else model.double()


@pytest.mark.parametrize("name", [*CONFIGS, "lora_dropout"])
def test_training_computes_the_loss_of_evaluation(lab, tmp_path, name):
    trainer = lab.make_trainer(tmp_path, model=build(name), interactions=lab.make_interactions(2))
    items = [trainer.train_dataset[index] for index in range(4)]
    losses = []
    for training in (False, True, True):
        trainer.model.train(training)
        with torch.no_grad():
            losses.append(float(trainer.run_pass(trainer.model, items, 4)[0]))
    assert losses[0] > 1e-3
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-9)


def test_phimoe_trains_as_it_answers(lab, tmp_path):
    """In evaluation its jitter decides which experts are close enough to be weighed against each other.

    The answers' log-probabilities and the gradient of a step, against the model's own passes in evaluation mode.
    """
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(**SHAPE, **MORE, num_local_experts=4, router_jitter_noise=0.1)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    plain = copy.deepcopy(model).eval()
    trainer = lab.make_trainer(tmp_path, model=model, interactions=lab.make_interactions(2), mode="sampled_token")
    items = [trainer.train_dataset[index] for index in range(4)]

    def logps(prompt, completion):
        logits = plain(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]

    students = [logps(item.prompt_ids, item.completion_ids) for item in items]
    teachers = [logps(item.teacher_prompt_ids, item.completion_ids) for item in items]
    loss = sum(-((t - s).detach() * s).mean() for s, t in zip(students, teachers)) / 4
    loss.backward()
    model.train()
    with torch.no_grad():
        found = trainer.run_pass(model, items, 4)[1].student_logps
    torch.testing.assert_close(found, torch.cat(students).detach(), rtol=0, atol=1e-4)
    value, gradients = lab.gradients_of(trainer)
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert wanted["model.layers.0.mlp.router.weight"].norm() > 1e-3
    lab.assert_close(gradients, wanted, 1e-3)


def test_a_run_draws_no_random_numbers(lab, tmp_path):
    losses = []
    for seed in (1, 2):
        trainer = lab.make_trainer(tmp_path, model=build("seed_oss"), max_steps=2)
        torch.manual_seed(seed)
        trainer.train()
        losses.append(lab.losses_of(trainer))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["online", "chat"])
def test_online_and_chat_have_no_noise_either(lab, tmp_path, kind):
    from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer
    from fastsdpo.online.chat import ChatLearner

    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "template": lab.TEMPLATE}
    config, model = OnlineSDPOConfig(output_dir=str(tmp_path), **settings), build("seed_oss")
    if kind == "online":
        user = ConstantUser("w1")
        trainer = OnlineSDPOTrainer(model, config, user, ["w1 w2"], processing_class=lab.make_tokenizer())
    else:
        trainer = ChatLearner(model, config, lab.make_tokenizer()).trainer
    tokens = trainer.tokenize(lab.make_interactions(1)[1])
    trainer.model.train()
    with torch.no_grad():
        losses = {float(trainer.run_pass(trainer.model, [tokens], 1)[0]) for _ in range(3)}
    assert len(losses) == 1


class Noise(nn.Module):
    def forward(self, hidden):
        return hidden + 0.1 * torch.randn_like(hidden) if self.training else hidden


def test_other_noise_is_refused_with_the_module_s_name(lab, tmp_path):
    model = lab.make_model()
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, Noise())
    with pytest.raises(NotImplementedError, match=r"noise of model\.layers\.1\.mlp\.1 \(Noise\)"):
        lab.make_trainer(tmp_path, model=model.eval())
    assert not model.training


def test_noise_of_an_adapter_is_refused(lab, tmp_path):
    config = PveraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(lab.make_model(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1
    with pytest.raises(NotImplementedError, match=r"noise of .*q_proj \(Linear\)"):
        lab.make_trainer(tmp_path, model=model)


def test_neftune_by_hand_is_refused(lab, tmp_path):
    model = lab.make_model()
    transformers.integrations.neftune.activate_neftune(model, 5.0)
    with pytest.raises(NotImplementedError, match=r"noise of model\.embed_tokens"):
        lab.make_trainer(tmp_path, model=model)


def test_dropout_that_is_asked_for_is_said_and_not_shared(lab, tmp_path, caplog):
    trainer = lab.make_trainer(tmp_path, model=build("seed_oss"), disable_dropout=False)
    assert "student and teacher are noisy in training" in caplog.text
    assert trainer.sharing == "off"
    assert "branches would share the noise of model.layers.0.self_attn" in caplog.text
    assert trainer.model.model.layers[0].self_attn.residual_dropout == 0.1
    with pytest.raises(NotImplementedError, match="sharing='conversation' is not possible"):
        lab.make_trainer(tmp_path, model=build("seed_oss"), disable_dropout=False, sharing="conversation")


def test_a_rate_in_the_configuration_that_is_read_is_set_to_0_and_said(lab, tmp_path, caplog):
    model, kept = build("falcon"), build("granite")
    lab.make_trainer(tmp_path, model=model)
    assert model.config.hidden_dropout == model.config.attention_dropout == 0.0
    assert "hidden_dropout=0.1" in caplog.text
    lab.make_trainer(tmp_path, model=kept)
    assert kept.config.attention_dropout == 0.1  # it has its own copies: saved as it was loaded
