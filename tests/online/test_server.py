"""Answers from a server: a stand-in for the parts of vLLM's OpenAI-compatible API that are used."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

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
    wanted = {"model": "base", "max_tokens": 3, "temperature": 0.9, "top_p": 1.0, "top_k": 0, "seed": 5, "logprobs": 0}
    wanted |= {"return_token_ids": True, "stop_token_ids": [1, 7]}
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
    settings = {"generation_url": vllm.url, "max_steps": 3, "mode": "sampled_token", "ppo_clip": 0.2}
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = lab.trainer(tmp_path, peft_config=adapter, **settings)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "interactions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    paths = [path.rpartition("/")[2] for path, _ in vllm.asked]
    again = ["load_lora_adapter", "unload_lora_adapter", "completions"]
    assert paths == ["load_lora_adapter", "completions", *again, *again]
    names = [body["model"] for path, body in vllm.asked if path.endswith("completions")]
    assert names == ["sdpo-0", "sdpo-1", "sdpo-2"]
    folder = tmp_path / "adapters" / "sdpo-2"
    assert vllm.asked[5] == ("/v1/load_lora_adapter", {"lora_name": "sdpo-2", "lora_path": str(folder)})
    trainer.evaluate()  # with the weights of now
    assert [path.rpartition("/")[2] for path, _ in vllm.asked[8:]] == again
    assert vllm.asked[-1][1]["model"] == "sdpo-3" and vllm.asked[-1][1]["temperature"] == 0
    saved = load_file(tmp_path / "adapters" / "sdpo-3" / "adapter_model.safetensors")
    own = peft.get_peft_model_state_dict(trainer.model)
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)


def test_the_importance_ratio_is_to_the_servers_log_probabilities(lab, vllm, tmp_path):
    trainer = lab.trainer(tmp_path, generation_url=vllm.url, generation_sync="none", max_steps=1, is_clip=2.0)
    batch = {"prompts": [(0, trainer.train_dataset.prompts[0])]}
    ((item,),) = ([i for i in b["interactions"]] for b in trainer.prepare_batches([batch]))
    options = trainer.pass_options([item])
    assert options["old_logps"].tolist() == [-1.0, -2.0, -0.5]
    assert options["is_clip"] == 2.0


@pytest.fixture
def transfer(monkeypatch):
    """The trainer's side of vLLM's weight transfer, as its documentation has it; what is sent is kept."""
    kept = SimpleNamespace(made=[], sent=[])

    class Engine:
        def __init__(self, source):
            self.source = source

        def send_weights(self):
            kept.sent.append({name: value.detach().clone() for name, value in self.source.named_parameters()})

    def trainer_init(init_info, *, client, source=None):
        kept.made.append((init_info, client))
        return Engine(source)

    for name, content in {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "WeightTransferTrainerFactory": SimpleNamespace(trainer_init=trainer_init),
            "ModuleSource": lambda module: module,
            "HTTPVLLMWeightSyncClient": lambda base_url: base_url,
        },
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": dict},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "10.0.0.1", "get_open_port": lambda: 29501},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return kept


def test_all_weights_by_weight_transfer(lab, vllm, transfer, tmp_path):
    trainer = lab.trainer(tmp_path, generation_url=vllm.url, generation_sync="weights", max_steps=2)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    trainer.evaluate()
    trainer.evaluate()  # nothing has changed since
    root = vllm.url.removesuffix("/v1")
    info = {"master_address": "10.0.0.1", "master_port": 29501, "world_size": 3, "rank": 0}
    assert transfer.made == [(info, root)]
    again = ["/pause", "/resume", "/v1/completions"]
    assert [path for path, _ in vllm.asked] == [*again * 3, "/v1/completions"]
    assert all(torch.equal(transfer.sent[0][name], before[name]) for name in before)
    now = dict(trainer.model.named_parameters())
    assert len(transfer.sent) == 3 and all(torch.equal(transfer.sent[2][name], now[name]) for name in now)
    assert not torch.equal(transfer.sent[1]["model.norm.weight"], transfer.sent[2]["model.norm.weight"])


def test_weights_that_cannot_be_sent(lab, vllm, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    weights = {"generation_url": vllm.url, "generation_sync": "weights"}
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="'weights' a model without one"):
        lab.trainer(tmp_path, peft_config=adapter, **weights)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="needs the package vllm beside the trainer, of a version with"):
        lab.trainer(tmp_path, **weights)


def test_a_server_that_is_not_vllm(vllm, tmp_path):
    """What `transformers serve` answers (transformers 5.23)."""
    vllm.refuse = "Unexpected fields in the request: {'return_token_ids', 'stop_token_ids'}"
    server = ServerSampler(vllm.url, "base", folder=tmp_path)
    with pytest.raises(ConnectionError, match=r"refused prompts of token ids: .*422.*`transformers serve` takes text"):
        sample(server)
    adapter = SimpleNamespace(save_pretrained=lambda path, state_dict: None)
    with pytest.raises(ConnectionError, match=r"refused an adapter \(it needs --enable-lora"):
        server.load_adapter(adapter, "sdpo-1", {})
