"""Log-probs of labels without logits, the loss for `transformers.Trainer`, ZeRO-3's empty heads."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import fastsdpo
from fastsdpo.integrations.transformers import SDPOLabels, fused_logps, gathered_head, sdpo_loss_func
from fastsdpo.prefix import head_parameters, run_inside

SHAPE = dict(vocab_size=63, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)


def make(family, folder):
    torch.manual_seed(0)
    if family == "gemma2":  # a softcap
        config = transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5)
        return transformers.Gemma2ForCausalLM(config)
    if family == "cohere":  # a scale
        config = transformers.CohereConfig(**SHAPE, logit_scale=0.3, initializer_range=0.5)
        return transformers.CohereForCausalLM(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if family == "lora on the head":
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        return get_peft_model(model, config)
    return model


@pytest.fixture
def batch():
    ids = torch.randint(6, 60, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model, batch, temperature):
    """What the helper replaces."""
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    log_probs = (model(**given).logits[:, :-1].float() / temperature).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    logps = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    counts = labels != -100
    return [torch.nn.functional.pad(x * counts, (1, 0)) for x in (logps, entropy.detach())]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "cohere", "lora on the head"])
def test_fused_logps(family, qwen2_folder, batch):
    def fused(model, batch, temperature):
        return fused_logps(model, **batch, temperature=temperature, return_entropy=True)

    found, want = [], []
    for results, function in ((want, plain), (found, fused)):
        model = make(family, qwen2_folder)
        logps, entropy = function(model, batch, 0.6)
        assert not entropy.requires_grad
        (logps * torch.arange(24).view(3, 8)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results += [logps.detach(), entropy, *grads]
    assert len(found) == len(want) >= 4
    for got, wanted in zip(found, want):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_fused_logps_alone(qwen2_folder, batch):
    """Without gradients, without a mask, with chunks of one token, and with nothing that counts."""
    model = make("qwen2", qwen2_folder)
    batch["attention_mask"] = None
    want = plain(model, batch, 1.0)[0]
    with torch.no_grad():
        found = fused_logps(model, **batch, chunk_size=1)
    torch.testing.assert_close(found, want.detach(), rtol=1e-5, atol=1e-5)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    logps = fused_logps(model, **batch)
    logps.sum().backward()
    assert (logps == 0).all() and all((p.grad == 0).all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"labels must have the shape \[B, L\].*\(3, 8\), got \(3, 7\)"):
        fused_logps(model, batch["input_ids"], None, batch["labels"][:, 1:])


def examples(count=8):
    generator = torch.Generator().manual_seed(0)

    def example(length):
        ids = torch.randint(6, 60, (length,), generator=generator)
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(torch.arange(length) < 2, -100),
            "teacher_logps": -3 * torch.rand(length, generator=generator),
            "old_logps": -3 * torch.rand(length, generator=generator),
            "teacher_topk_ids": torch.rand(length, 60, generator=generator).topk(4).indices,
            "teacher_topk_logps": torch.rand(length, 5, generator=generator).log_softmax(-1)[:, :4],
        }

    return [example(6 + number % 3) for number in range(count)]


PADDING = {"labels": -100, "teacher_logps": 0.0, "old_logps": 0.0, "teacher_topk_logps": -2.0}


def collate(rows):
    def padded(key, value=0):
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)

    labels = {key: padded(key, value) for key, value in PADDING.items()}
    topk = padded("teacher_topk_ids", -1)
    labels["teacher_topk_ids"] = torch.where(topk < 0, torch.arange(4), topk)  # distinct ids in padding too
    mask = padded("labels", -1) != -1
    return {"input_ids": padded("input_ids"), "attention_mask": mask.long(), "labels": SDPOLabels(labels)}


def train(folder, output, *, batch_size, accumulate, collator=collate, **options):
    settings = {"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "use_cpu": True}
    settings |= {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
    args = transformers.TrainingArguments(output_dir=str(output), remove_unused_columns=False, **settings)
    model, loss_of = transformers.AutoModelForCausalLM.from_pretrained(folder), sdpo_loss_func(**options)
    data = {"train_dataset": examples(), "data_collator": collator}
    trainer = transformers.Trainer(model=model, args=args, compute_loss_func=loss_of, **data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, [p.detach() for p in trainer.model.parameters()]


def test_the_hidden_states_themselves(qwen2_folder, batch):
    """A body that returns what it is given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen2_folder)
    hidden = run_inside(model, lambda states: states, {"input_ids": batch["input_ids"]})
    torch.testing.assert_close(model.lm_head(hidden), model(input_ids=batch["input_ids"]).logits)


MODES = [{"mode": "sampled_token", "is_clip": 1.5}, {"mode": "topk", "alpha": 0.5, "temperature": 0.8}]


@pytest.mark.parametrize("options", MODES, ids=lambda options: options["mode"])
def test_trainer_and_accumulation(options, qwen2_folder, tmp_path):
    """Four micro-batches of one sequence are one batch of four: the mean is over their tokens."""
    large = train(qwen2_folder, tmp_path, batch_size=4, accumulate=1, **options)
    small = train(qwen2_folder, tmp_path, batch_size=1, accumulate=4, **options)
    assert small[0] == pytest.approx(large[0], rel=1e-4)
    for got, want in zip(small[1], large[1]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_trainer_with_labels_that_it_does_not_count(qwen2_folder, tmp_path):
    """Uncounted, each of four micro-batches would weigh as much as the whole step."""

    def plain(rows):
        batch = collate(rows)
        return batch | {"labels": dict(batch["labels"])}

    # From Python 3.12 on Trainer itself fails on the dict, with a KeyError.
    with pytest.raises((ValueError, KeyError), match=r"labels must be SDPOLabels|slice"):
        train(qwen2_folder, tmp_path, batch_size=1, accumulate=4, collator=plain)


def test_loss_func_value(qwen2_folder):
    batch = collate(examples(3))
    labels = batch.pop("labels")
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen2_folder)
    outputs = model(**batch)
    loss = sdpo_loss_func()(outputs, labels)
    s, _ = plain(model, {**batch, "labels": labels["labels"]}, 1.0)
    counts = labels["labels"] != -100
    want = ((s - labels["teacher_logps"]).detach() * s)[counts].mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(sdpo_loss_func()(outputs, labels, 2 * counts.sum()), want / 2)
    assert torch.equal(labels[..., 1:], labels["labels"][..., 1:])
    assert labels.ne(-100).sum() == (labels["labels"] != -100).sum()


def test_loss_func_errors():
    with pytest.raises(ValueError, match=r"mode must be one of \('sampled_token', 'topk'\), got 'full'"):
        sdpo_loss_func(mode="full")
    with pytest.raises(ValueError, match=r"labels must be SDPOLabels with labels, teacher_logps for"):
        sdpo_loss_func()(SimpleNamespace(logits=None), torch.zeros(2, 3))
    labels = SDPOLabels(labels=torch.zeros(1, 2), teacher_logps=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"old_logps for .*got SDPOLabels of \['labels', 'teacher_logps'\]"):
        sdpo_loss_func(is_clip=2.0)(SimpleNamespace(logits=None), labels)
    items = torch.full((2, 1), 7)  # what Trainer gives where a process has two GPUs
    with pytest.raises(NotImplementedError, match=r"DataParallel .*torchrun"):
        sdpo_loss_func()(SimpleNamespace(logits=None), labels, items)


@pytest.fixture
def zero3(monkeypatch):
    """A ``deepspeed`` whose `GatheredParameters` fills in the parameters that `partition` emptied."""
    gathered = []

    def partition(*parameters):
        for parameter in parameters:
            parameter.whole = parameter.data
            parameter.data = torch.empty(0)
            parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")

    @contextmanager
    def gather(parameters):
        gathered.append(len(parameters))
        for parameter in parameters:
            parameter.data, parameter.ds_status = parameter.whole, SimpleNamespace(name="AVAILABLE")
        yield
        for parameter in parameters:
            parameter.data, parameter.ds_status = torch.empty(0), SimpleNamespace(name="NOT_AVAILABLE")

    deepspeed = ModuleType("deepspeed")
    deepspeed.zero = SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    return SimpleNamespace(partition=partition, gathered=gathered)


def divergence(model, batch):
    def loss(hidden):
        with gathered_head(model, model):
            weight, ids = head_parameters(model).weight, batch["labels"][:, 1:]
            return fastsdpo.linear_sdpo_loss(hidden[:, :-1], hidden[:, 1:].detach(), weight, ids, mode="full").loss

    return run_inside(model, loss, {"input_ids": batch["input_ids"], "use_cache": False})


def test_head_of_zero3(zero3, qwen2_folder, batch):
    """The head is gathered once, whole gradients reach decoder and head after it is empty again."""
    model = make("qwen2", qwen2_folder)
    loss = divergence(model, batch)
    loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}

    model = make("qwen2", qwen2_folder)
    weight, grads = model.lm_head.weight, []
    model.lm_head.forward = lambda hidden: hidden.new_zeros(*hidden.shape[:2], 63)  # its own hook's job
    weight.register_hook(lambda grad: grads.append(grad.clone()))
    zero3.partition(weight)
    found = divergence(model, batch)
    assert zero3.gathered == [1] and weight.numel() == 0
    weight.data = weight.whole  # as DeepSpeed does before it reduces the gradient
    found.backward()
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(grads[0], want.pop("lm_head.weight"))
    for name, grad in want.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_zero3_refusals(zero3, qwen2_folder, batch):
    model = make("qwen2", qwen2_folder)
    model.lm_head.weight.ds_status = SimpleNamespace(name="AVAILABLE")  # tied, or in its own forward
    with gathered_head(model):
        assert zero3.gathered == []
    zero3.partition(model.lm_head.weight)
    with pytest.raises(NotImplementedError, match="ZeRO-3 frees the head before the backward pass"):
        fused_logps(model, **batch)
    model.lm_head.forward = lambda hidden: hidden.new_zeros(*hidden.shape[:2], 63)
    with torch.no_grad():
        found = fused_logps(model, **batch)
    whole = make("qwen2", qwen2_folder)
    torch.testing.assert_close(found, fused_logps(whole, **batch).detach())
    with pytest.raises(ValueError, match="an empty head is partitioned by DeepSpeed ZeRO-3"):
        fastsdpo.linear_token_logps(torch.zeros(1, 32), model.lm_head.weight, torch.zeros(1, dtype=torch.long))
