"""Answers of models with channels, reasoning and several end tokens: what is said, and what is trained on.

The models here are tiny and write a fixed text, by position; generation, chat, users and training are
the real ones.
"""

import json
import math

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from fastsdpo.cli import main
from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer
from fastsdpo.online.chat import ChatLearner
from fastsdpo.online.content import content, perplexity
from fastsdpo.online.sampling import ServerSampler, generate
from fastsdpo.online.users import LocalChat

CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>"
    "{% endif %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHANNEL_TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
THOUGHT = "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant"
TURN_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
# name: (template, tokens, eos, what the model writes, what of it is said, how many tokens end it)
MODELS = {
    "channels": (CHANNELS, CHANNEL_TOKENS, "<|return|>", f"{THOUGHT}<|channel|>final<|message|>Hi!<|return|>", "Hi!"),
    "reasoning": (THINKS, TURN_TOKENS, "<|end|>", "They greet.\n</think>\n\nHi!<|end|>", "Hi!"),
    "the next turn's token": (TURNS, TURN_TOKENS, "<|endoftext|>", "Hi!<|user|>", "Hi!"),
    "an end of its own": (TURNS, [*TURN_TOKENS, "<|stop|>"], "<|endoftext|>", "Hi!<|stop|>", "Hi!"),
}
HELLO = [{"role": "user", "content": "hello"}]


def scripted(tokenizer, start, text):
    """A model that writes the text from position `start` on, and then the letter x for ever."""
    torch.manual_seed(0)
    shape = {"n_positions": 255, "n_embd": 256, "n_layer": 1, "n_head": 2, "tie_word_embeddings": False}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(**shape, **tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    follows = [0] * (start - 1) + ids
    follows += tokenizer("x")["input_ids"] * (255 - len(follows))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Places at right angles to each other, and to the mean, which the last norm takes away.
        random = torch.randn(256, 256)
        random[:, 0] = 1.0
        places = torch.linalg.qr(random).Q.T[1:]
        model.transformer.wpe.weight.copy_(places)
        model.transformer.ln_f.weight.fill_(1.0)
        for place, token in zip(places, follows):
            model.lm_head.weight[token] += 3 * place
    return model, ids


@pytest.fixture(params=MODELS)
def answering(request, byte_tokenizer):
    """(model, tokenizer, the ids it writes in answer to "hello", what of them is said)"""
    template, special, eos, text, said = MODELS[request.param]
    tokenizer = byte_tokenizer(template, special, ["<think>", "</think>"], eos_token=eos, pad_token=special[0])
    prompt = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    model, ids = scripted(tokenizer, start, text)
    if request.param == "an end of its own":
        stop = tokenizer.convert_tokens_to_ids("<|stop|>")
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    return model, tokenizer, ids, said, prompt


SETTINGS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
SETTINGS |= {"max_new_tokens": 80, "sampling_temperature": 0.01, "template": "note", "learning_rate": 1e-5}


def test_chat_shows_the_answer_and_learns_from_all_of_it(answering, tmp_path):
    model, tokenizer, ids, said, prompt = answering
    learner = ChatLearner(model, OnlineSDPOConfig(output_dir=str(tmp_path), **SETTINGS), tokenizer)
    grown = []
    text, item = learner.answer(HELLO, show=grown.append)
    assert text == said == grown[-1]
    assert all(said.startswith(shorter.rstrip("\ufffd")) for shorter in grown)  # nothing shown is taken back
    assert item.completion_ids == ids
    assert tokenizer.decode(item.prompt_ids) == prompt
    seen = []
    run_pass = learner.trainer.run_pass
    learner.trainer.run_pass = lambda *a, **k: seen.extend(a[1]) or run_pass(*a, **k)
    learner.learn(HELLO, item.completion_ids, "Shorter")
    assert (seen[0].prompt_ids, seen[0].completion_ids) == (item.prompt_ids, ids)
    told = [{"role": "user", "content": "hello\n\nNote: Shorter"}]
    assert tokenizer.decode(seen[0].teacher_prompt_ids) == tokenizer.apply_chat_template(
        told, tokenize=False, add_generation_prompt=True
    )


def test_users_see_what_is_said(answering, tmp_path):
    """And the log holds it, from which a later run can train; this one trains on what was written."""
    model, tokenizer, ids, said, _ = answering
    seen = []

    class User(ConstantUser):
        def feedback(self, prompts, responses):
            seen.extend(responses)
            return super().feedback(prompts, responses)

    config = OnlineSDPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **SETTINGS)
    trainer = OnlineSDPOTrainer(model, config, User("Shorter"), ["hello"] * 2, ["hello"], tokenizer)
    ((one, two),) = trainer.roll_out([[(0, HELLO), (1, HELLO)]], 0)
    assert seen == [said] * 2
    assert one.completion_ids == two.completion_ids == ids
    rows = [json.loads(line) for line in (tmp_path / "interactions.jsonl").read_text().splitlines()]
    assert [row["completion"]["content"] for row in rows] == [said] * 2
    assert trainer.evaluate()["eval_ended"] == 1.0
    row = json.loads((tmp_path / "eval_answers.jsonl").read_text())
    assert row["response"] == said


def test_a_local_model_replies_with_what_it_says(answering):
    model, tokenizer, _, said, _ = answering
    chat = LocalChat(model, tokenizer, temperature=0.0, max_new_tokens=80)
    assert chat.replies([HELLO]) == [said]
    short = LocalChat(model, tokenizer, temperature=0.0, max_new_tokens=1)
    assert short.replies([HELLO])[0] in (None, "H")  # nothing yet, where there is reasoning


def test_the_signal_of_what_the_model_answers(answering, tmp_path, capsys):
    model, tokenizer, ids, said, _ = answering
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = tmp_path / "signal.json"
    argv = ["signal", "--prompt", "hello", "--followup", "Shorter", "--model", str(tmp_path), "--no-unrelated"]
    argv += ["--json", str(report), "--quiet"]
    # Temperature 1, at which this model still writes its text.
    assert main([*argv, "--max-new-tokens", "80"]) == 0
    found = json.loads(report.read_text())
    assert found["interaction"]["completion"] == said
    assert "stopped after" not in found["notes"][0]
    if len(ids) > 30:
        assert main([*argv, "--max-new-tokens", "20"]) == 1
        assert "the model said nothing in 20 tokens but reasoning" in capsys.readouterr().err


@pytest.mark.parametrize("answering", ["channels", "reasoning"], indirect=True)
def test_chat_learns_nothing_about_an_answer_that_was_not_said(answering, tmp_path, monkeypatch, capsys):
    model, tokenizer, *_ = answering
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = iter(["hello", "well?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    argv = ["chat", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "chat"), "--cpu", "--lora", "0"]
    argv += ["--max-new-tokens", "9", "--sampling-temperature", "0.01"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "model >" not in shown.out
    assert shown.err.count("cut while it was still reasoning") == 2
    assert not (tmp_path / "chat" / "interactions.jsonl").exists()


class TestDrawing:
    """Without a temperature the model's own generation config says how to draw."""

    def draw(self, model, temperature, seed="a"):
        prompts = [[6, 7, 8], [9, 10]]
        found = generate(model, prompts, max_new_tokens=6, temperature=temperature, end_ids=[1], seed=seed)
        return [sample.ids for sample in found]

    def test_as_the_model_has_it(self, lab):
        model, ends = lab.model(), {"eos_token_id": 1, "pad_token_id": 0}
        likeliest = self.draw(model, 0.0)
        model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=1, **ends)
        assert self.draw(model, None) == likeliest  # the one of the top 1
        assert self.draw(model, 5.0) != likeliest  # of all
        assert self.draw(model, None, "b") == likeliest
        model.generation_config = GenerationConfig(do_sample=True, temperature=1e-3, repetition_penalty=5.0, **ends)
        row = self.draw(model, None)[0]
        assert len(set(row)) == len(row)
        assert model.generation_config.temperature == 1e-3  # put back

    def test_where_the_model_says_nothing(self, lab):
        model = lab.model()
        assert self.draw(model, None) == self.draw(model, 0.7)
        assert self.draw(model, None) != self.draw(model, 0.0)

    def test_chat_draws_as_the_model_has_it(self, lab, saved, tmp_path, monkeypatch, capsys):
        file = tmp_path / "model" / "generation_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "do_sample": True, "temperature": 9.0, "top_k": 1}))
        expected = lab.tokenizer().decode(
            generate(lab.model(), [[2, 8, 1, 3]], max_new_tokens=6, temperature=0.0, end_ids=[1])[0].ids,
            skip_special_tokens=True,
        )
        lines = iter(["w1", "/quit"])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        argv = ["chat", "--model", saved, "-o", str(tmp_path / "chat"), "--template", " note {o}", "--cpu", "--quiet"]
        assert main([*argv, "--max-new-tokens", "6"]) == 0
        assert capsys.readouterr().out.strip() == expected

    def test_a_server_is_told_or_left_alone(self, vllm, tmp_path):
        server = ServerSampler(vllm.url, folder=tmp_path)
        for temperature in (0.9, None):
            server.sample([[3]], max_new_tokens=3, temperature=temperature, end_ids=[1])
        told, alone = (body for _, body in vllm.asked)
        drawing = {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert {name: told[name] for name in drawing} == drawing
        assert not drawing.keys() & alone.keys()


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("How do hash tables work?", "Hash tables work by hashing.", (1.0, 1, False, False)),  # hash, hashi(ng)
        ("What is a prime number?", "A prime number is a number.", (1.0, 0, True, False)),
        ("What is a prime number?", "I'm sorry, as an AI I know no numbers.", (0.5, 2, False, True)),
        ("Why?", "Because.", (None, 1, False, False)),
        ("Was ist eine Primzahl?", "Eine Primzahl hat zwei Teiler.", (1.0, 2, False, False)),
    ],
)
def test_content(question, answer, expected):
    assert tuple(content(question, answer)) == expected


def test_perplexity_is_that_of_the_model(lab):
    """Beside the model's own loss, token by token."""
    model, tokenizer = lab.model(), lab.tokenizer()
    talks = [[{"role": "user", "content": f"w{i} w2"}, {"role": "assistant", "content": "w3 w4 w5"}] for i in range(3)]
    ids = [tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)[:7] for talk in talks]
    losses = [model(input_ids=torch.tensor([one]), labels=torch.tensor([one])).loss.item() for one in ids]
    assert perplexity(model, tokenizer, talks, max_tokens=7) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
