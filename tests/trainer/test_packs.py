"""Which process takes what of a global batch."""

import contextlib
import itertools
import random

import pytest
import torch

from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.pack_table import PackTable
from fastsdpo.trainer.packs import GroupSampler


def batched(order, size):
    return (order[start : start + size] for start in range(0, len(order), size))


@pytest.fixture(scope="module")
def dataset(lab):
    """Conversations of one to four interactions, a few of them ten times as long as the others."""
    draw, tokenizer, items = random.Random(0), lab.make_tokenizer(), []
    for number in range(60):
        turns = lab.make_interactions(1, turns=draw.randint(1, 4), seed=number)
        many = draw.choice((1, 1, 1, 10))
        for item in turns:
            prompt = [{**m, "content": " ".join([m["content"]] * many)} for m in item.prompt]
            items.append(item.__class__(prompt, item.completion, item.followup, item.id, f"c{number}"))
    return InteractionDataset.from_source(items, tokenizer, "note {o}")


@pytest.mark.parametrize("sharing", ["conversation", "off"])
@pytest.mark.parametrize(
    ("each", "processes", "accumulated"), [(4, 4, 1), (1, 3, 1), (8, 2, 1), (5, 1, 2), (2, 2, 4), (1, 4, 4)]
)
def test_work_is_shared_out_and_steps_stay_the_same(dataset, sharing, each, processes, accumulated):
    groups, costs = dataset.groups(sharing == "conversation"), dataset.costs(sharing)
    size = {"each": each, "processes": processes, "accumulated": accumulated, "seed": 3}
    plain, shared = GroupSampler(groups, **size), GroupSampler(groups, **size, costs=costs)
    for sampler in (plain, shared):
        sampler.set_epoch(2)
    before, after = list(plain), list(shared)
    assert len(before) == len(after) == len(plain) == len(shared) and len(after) % (each * processes) == 0

    def waits(order):
        """Of all steps, the most that one process has to compute: in sum, and where it waits at every micro-batch."""
        summed = at_once = 0
        for step in batched(order, each * processes * accumulated):
            loads = [[] for _ in range(processes)]
            for number, part in enumerate(batched(step, each)):
                seen, load = set(), 0
                for index in (i for i in part if i is not None):
                    conversation = dataset.conversation_ids[index]
                    load += costs[index, int(conversation in seen)]
                    seen.add(conversation)
                loads[number % processes].append(load)
            summed += max(map(sum, loads))
            at_once += sum(map(max, zip(*loads)))
        return summed, at_once

    for left, right in zip(*(batched(order, each * processes * accumulated) for order in (before, after))):
        assert sorted(map(str, left)) == sorted(map(str, right))
    if processes == 1:
        assert before == after
    elif each * accumulated > 1:
        for shared_out, as_they_come in zip(waits(after), waits(before)):
            assert shared_out < (0.85 if accumulated == 1 else 0.95) * as_they_come
    assert after == list(itertools.chain(shared)), "the same at every pass"


@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_averaged_once_a_step(lab, tmp_path, monkeypatch, last):
    """With the last pack of the last micro-batch; FSDP2's no_sync would end the outer one of transformers."""
    trainer, held = lab.make_trainer(tmp_path, max_tokens_per_pack=60), []

    @contextlib.contextmanager
    def no_sync(model):
        held.append(True)
        yield

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    trainer.accelerator.gradient_state._set_sync_gradients(last)
    batch = {"interactions": [trainer.train_dataset[index] for index in range(4)]}
    trainer.training_step(trainer.model, batch, torch.tensor(4))
    assert len(held) == (len(batch["packs"]) - 1 if last else 0) and len(batch["packs"]) > 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)


@pytest.mark.parametrize("sharing", ["conversation", "off"])
def test_large_data_is_counted_by_a_sample(dataset, sharing, lab, tmp_path, monkeypatch):
    args = SDPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    tables = []
    for sampled in (10**6, len(dataset) // 3):
        monkeypatch.setattr("fastsdpo.trainer.pack_table.SAMPLED", sampled)
        tables.append(PackTable(lab.make_model(), args, dataset, sharing))
    whole, part = tables
    assert whole.exact and not part.exact
    for name in ("tokens", "unshared", "passes"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.1), name
    assert part.largest(None) == whole.largest(None), "the forecast of memory is the same"
