"""One part of the soak, in a process of its own; its last line is JSON. See test_soak.

Usage: soak_worker.py PART SETTINGS_JSON   with PART one of the functions in `PARTS`
"""

import functools
import gc
import importlib
import itertools
import json
import os
import random
import sys
import time
import tracemalloc
import types
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import TrainerCallback

import fastsdpo

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))
OURS = ("fastsdpo", "torch._dynamo", "torch._library", "torch.library", "torch._functorch", "torch._subclasses")


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_since_reset():
    """The highest `resident` since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def reset_peak():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def cached():
    """Entries of functools caches and of module-level containers of fastsdpo, dynamo and torch.library."""
    found = 0
    for name, module in list(sys.modules.items()):
        if not name.startswith(OURS) or not isinstance(module, types.ModuleType):
            continue
        for value in list(vars(module).values()):
            if isinstance(value, (Mapping, list, set)):
                found += len(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                found += value.cache_info().currsize
    return found


def gauge():
    """One reading of everything that must not grow; objects that `gc.freeze` was given are not counted."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [item for item in objects if issubclass(type(item), torch.Tensor)]
    return {
        "resident": resident(),
        "traced": tracemalloc.get_traced_memory()[0],
        "objects": len(objects),
        "tensors": len(tensors),
        "tensor_bytes": sum(t.untyped_storage().nbytes() for t in tensors),
        "graph": sum(tensor.grad_fn is not None for tensor in tensors),
        "cached": cached(),
        "files": len(os.listdir("/proc/self/fd")),
    }


class Meter(TrainerCallback):
    """Reads the gauges every ``period`` steps or more, and ends the run when its time is over.

    Metrics are kept from one line of the log to the next, so readings are taken at the same place between
    two of them. The lines themselves are kept by transformers for as long as the run lasts: their bytes
    and objects are taken off. Where a leak is to be planted, as many steps as at least were taken follow,
    each of which leaves a tensor with its graph.
    """

    def __init__(self, settings):
        self.period, self.least = settings["period"], settings["steps"]
        self.seconds, self.leak_steps = settings.get("seconds", 0), settings.get("leak_steps", 0)
        self.readings, self.started, self.next = [], time.monotonic(), 0.0
        self.flat, self.steps, self.took = [], 0, 0.0
        self.held = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.held is not None:
            self.held.append((model.get_input_embeddings().weight[:1] * 2).sum())
        if state.global_step == self.period:
            gc.collect()
            gc.freeze()  # modules and functions: what is looked for is younger
            tracemalloc.start()
        if state.global_step % self.period:
            return
        gone = time.monotonic() - self.started
        share = (state.global_step - self.steps) / (self.least if self.held is None else self.leak_steps)
        if self.seconds and self.held is None:
            share = min(share, gone / self.seconds)
        if share >= self.next:
            self.readings.append(self.read(state))
            self.next = share + 1 / 60
        if share >= 1 and self.held is None:
            self.flat, self.readings, self.next = self.readings, [], 0.0
            self.steps, self.took, self.held = state.global_step, gone, []
            control.should_training_stop = not self.leak_steps
        elif share >= 1:
            control.should_training_stop = True

    def read(self, state):
        found = {"step": state.global_step, **gauge()}
        lines = state.log_history
        kept = [*lines, *self.readings, *self.flat]
        parts = {id(part): part for line in kept for part in (line, *line, *line.values())}
        found["traced"] -= sum(map(sys.getsizeof, parts.values()))
        found["objects"] -= sum(map(gc.is_tracked, kept))
        return found


def intervals(period):
    every = {"logging_steps": period, "eval_steps": period, "save_steps": period, "save_total_limit": 2}
    return {**every, "eval_strategy": "steps", "save_strategy": "steps", "max_steps": 10**6, "learning_rate": 1e-4}


def offline(settings, meter):
    lab = importlib.import_module("tests.trainer.conftest")
    data = lab.make_interactions(40)
    options = {"allow_leaks": True, "teacher": "ema", "reference_kl": 0.01, "max_tokens_per_pack": 200}
    options |= {"interactions": data, "eval_dataset": data[:4], **intervals(settings["period"])}
    return lab.make_trainer(settings["folder"], callbacks=[meter], **options)


def online(settings, meter):
    options = {"updates_per_batch": 2, "stop_when_degenerate": None, **intervals(settings["period"])}
    return importlib.import_module("tests.online.conftest").make_trainer(
        settings["folder"], callbacks=[meter], **options
    )


def train(make):
    def part(settings):
        meter = Meter(settings)
        trainer = make(settings, meter)
        trainer.train()
        return {"readings": meter.flat, "leaking": meter.readings, "steps": meter.steps, "seconds": meter.took}

    return part


def compiled(settings):
    """A compiled loss on batches of many lengths: graphs and caches after a few and after all."""
    readings = []
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", dynamic=True)
    def loss_of(student, teacher, targets):
        return fastsdpo.sdpo_loss(student, teacher, targets, mode="full").loss

    from torch._dynamo.utils import counters

    draw = random.Random(0)
    every = max(4, settings["calls"] // 40)
    for call in range(settings["calls"]):
        tokens = draw.randint(2, 60)
        student = torch.randn(tokens, 50, requires_grad=True)
        loss_of(student, torch.randn(tokens, 50), torch.randint(0, 50, (tokens,))).backward()
        if call == every:
            gc.collect()
            gc.freeze()
            tracemalloc.start()
        if call % every == 0 and call > every:
            readings.append({"step": call, "graphs": counters["stats"]["unique_graphs"], **gauge()})
    return {"readings": readings, "steps": settings["calls"]}


def scale(settings):
    """`prepare`, the dataset and the planner on so many interactions: peak memory of each, and its time."""
    from fastsdpo.cli import main
    from fastsdpo.prefix import build_plan, pack_conversations
    from fastsdpo.trainer.data import InteractionDataset
    from fastsdpo.trainer.packs import GroupSampler, collate, split_packs

    lab = importlib.import_module("tests.trainer.conftest")
    folder, wanted = Path(settings["folder"]), settings["interactions"]
    source, output = folder / "conversations.jsonl", folder / "interactions.jsonl"
    draw = random.Random(0)
    turns = 2
    with open(source, "w") as file:
        for number in range(wanted // turns):
            roles = [("user", "assistant")[place % 2] for place in range(2 * turns + 1)]
            messages = [{"role": role, "content": " ".join(draw.choices(lab.WORDS, k=12))} for role in roles]
            file.write(json.dumps({"id": f"c{number}", "messages": messages}) + "\n")
    found = {"stages": {}}

    def stage(name, call):
        reset_peak()
        before, started = resident(), time.perf_counter()
        result = call()
        seconds = time.perf_counter() - started
        found["stages"][name] = {"peak_bytes": peak_since_reset() - before, "seconds": seconds}
        return result

    tokenizer = lab.make_tokenizer()
    prepare = ["prepare", str(source), "--preset", "none", "--quiet", "-o"]
    # What is made once, whatever the size.
    assert main([*prepare, str(folder / "few.jsonl"), "--limit", "300"]) == 0
    InteractionDataset.from_source(folder / "few.jsonl", tokenizer, lab.TEMPLATE)
    assert stage("prepare", lambda: main([*prepare, str(output), "--eval-fraction", "0.05"])) == 0
    report = json.loads((folder / "interactions.report.json").read_text())
    found["interactions"] = report["interactions"] + report["eval_interactions"]
    found["output_bytes"] = sum(report["sizes"])
    dataset = stage("dataset", lambda: InteractionDataset.from_source(output, tokenizer, lab.TEMPLATE))
    found["dataset_interactions"], found["tokens"] = len(dataset), len(dataset.tokens)
    groups = stage("groups", lambda: dataset.groups(True))

    def pack_all():
        packs = pack_conversations(dataset, groups, max_tokens=2000)
        assert sum(map(len, packs)) == len(dataset)

    stage("pack_conversations", pack_all)

    def plan_all():
        planned, indices = 0, iter(GroupSampler(groups, each=8))
        while batch := [dataset[index] for index in itertools.islice(indices, 8)]:
            for pack in split_packs(collate(batch)["interactions"], 2000, "conversation"):
                planned += len(pack)
                build_plan(pack)
        return planned

    found["planned"] = stage("batches and plans", plan_all)
    return found


PARTS = {"offline": train(offline), "online": train(online), "compiled": compiled, "scale": scale}

if __name__ == "__main__":
    torch.set_num_threads(1)
    answer = PARTS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps(answer), flush=True)
