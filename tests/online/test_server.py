"""Answers from a server: a stand-in for the parts of vLLM's OpenAI-compatible API that are used."""

from __future__ import annotations

import json

import pytest
import torch

from fastsdpo.online.sampling import ServerSampler

pytest.importorskip("openai")


def sample(server, prompts=((3, 4), (5,))):
    return server.sample([list(p) for p in prompts], max_new_tokens=3, temperature=0.9, end_ids=[1, 7], seed=5)


def test_the_request_and_the_order_of_the_answers(vllm, tmp_path):
    server = ServerSampler(vllm.url, folder=tmp_path)
    assert server.model == "base"
    found = sample(server)
    assert [one.ids for one in found] == [[10, 11, 1]] * 2
    torch.testing.assert_close(found[0].logps, torch.tensor([-1.0, -2.0, -0.5]))
    ((path, body),) = vllm.asked
    assert path == "/v1/completions"
    assert body["prompt"] == [[3, 4], [5]]
    wanted = {
        "model": "base",
        "max_tokens": 3,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 5,
        "return_token_ids": True,
        "stop_token_ids": [1, 7],
        "logprobs": 0,
    }
    assert {key: body[key] for key in wanted} == wanted


def test_tokens_after_the_end_are_cut(vllm, tmp_path):
    def longer(choices):
        for choice in choices:
            choice["token_ids"] = [10, 7, 12, 1]
            choice["logprobs"]["token_logprobs"] = [-1.0, -2.0, -3.0, -4.0]
        return choices

    vllm.spoil = longer
    found = sample(ServerSampler(vllm.url, "base", folder=tmp_path))
    assert found[0].ids == [10, 7]
    assert found[0].logps.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda choices: choices[:1], r"left out prompts \[1\]"),
        (lambda choices: [{**c, "token_ids": None} for c in choices], "no token ids"),
        (lambda choices: [{**c, "logprobs": None} for c in choices], "no token ids or log-prob"),
    ],
)
def test_answers_that_cannot_be_used(spoil, message, vllm, tmp_path):
    vllm.spoil = spoil
    with pytest.raises(RuntimeError, match=message):
        sample(ServerSampler(vllm.url, "base", folder=tmp_path))


def test_servers_that_cannot_be_used(vllm, tmp_path):
    vllm.models = []
    with pytest.raises(ConnectionError, match="lists no models"):
        ServerSampler(vllm.url, folder=tmp_path)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        ServerSampler("http://127.0.0.1:1/v1", folder=tmp_path, timeout=1.0)
    with pytest.raises(ValueError, match="url must be like"):
        ServerSampler("localhost", folder=tmp_path)


def test_training_on_a_servers_answers_sends_it_the_adapter(lab, vllm, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="needs an adapter"):
        lab.trainer(tmp_path, generation_url=vllm.url)
    trainer = lab.trainer(
        tmp_path,
        generation_url=vllm.url,
        max_steps=3,
        mode="sampled_token",
        ppo_clip=0.2,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "interactions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    paths = [path.rpartition("/")[2] for path, _ in vllm.asked]
    assert paths == [
        "completions",
        "load_lora_adapter",
        "completions",
        "load_lora_adapter",
        "unload_lora_adapter",
        "completions",
    ]
    names = [body["model"] for path, body in vllm.asked if path.endswith("completions")]
    assert names == ["base", "sdpo-1", "sdpo-2"]
    loaded = vllm.asked[1][1]
    assert loaded["lora_name"] == "sdpo-1"
    assert (tmp_path / "adapters" / "sdpo-1" / "adapter_model.safetensors").exists()
    assert loaded["lora_path"] == str(tmp_path / "adapters" / "sdpo-1")


def test_the_importance_ratio_is_to_the_servers_log_probabilities(lab, vllm, tmp_path):
    trainer = lab.trainer(tmp_path, generation_url=vllm.url, generation_sync="none", max_steps=1, is_clip=2.0)
    batch = {"prompts": [(0, trainer.train_dataset.prompts[0])]}
    ((item,),) = ([i for i in b["interactions"]] for b in trainer.prepare_batches([batch]))
    options = trainer.pass_options([item])
    assert options["old_logps"].tolist() == [-1.0, -2.0, -0.5]
    assert options["is_clip"] == 2.0
