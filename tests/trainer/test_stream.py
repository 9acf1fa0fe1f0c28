"""Training on a stream: what data that lies there would give, without a pass over it; resumed, ended, refused."""

import gzip
import itertools
import json
import logging
import os
import subprocess
import tracemalloc
from dataclasses import replace

import pytest
from torch.utils.data import IterableDataset

from fastsdpo import Interaction
from fastsdpo.data import encoding
from fastsdpo.train import main
from fastsdpo.trainer import InteractionDataset, InteractionStream
from fastsdpo.trainer.data import SAMPLE_SIZE, Reading
from fastsdpo.trainer.stream import Position, StepShare, StreamSteps, shuffled
from tests.trainer.conftest import StopAt, command, losses_of, report_of, row

BLANK = Interaction([{"role": "user", "content": "w1"}], "w2", " ", "blank", "blank")  # no template takes it


class Rows(IterableDataset):
    """Interactions, and how many were taken."""

    def __init__(self, items):
        self.items, self.taken = items, 0

    def __iter__(self):
        for item in self.items:
            self.taken += 1
            yield item


def endless(lab):
    for number in itertools.count():
        yield from lab.make_interactions(40, seed=number)


def opened(lab, folder, source, **settings):
    args = lab.make_config(folder, **{"max_steps": 1000, **settings})
    stream = InteractionStream(source)
    stream.open(Reading(lab.make_tokenizer(), lab.TEMPLATE, "train_dataset", args.tokenizer_options(), False), args)
    return stream


def steps_of(stream, size, start=None):
    """The ids of each step, and the position behind it."""
    stream.start = start or Position()
    return [(InteractionDataset(columns).ids, position) for columns, position in stream.steps(size)]


def test_what_is_trained_on_is_that_of_data_which_lies_there(tmp_path, lab):
    """Ids, tokens, what is left out and the keys of the leak check; whole conversations, in another order."""
    items = [*lab.make_interactions(60), BLANK, *lab.make_interactions(30, seed=5)]
    options = {"max_prompt_length": 12, "max_completion_length": 4}
    whole = InteractionDataset.from_source(items, lab.make_tokenizer(), lab.TEMPLATE, **options)
    stream = opened(lab, tmp_path, Rows(items), shuffle_buffer=50, **options)
    found = [InteractionDataset(columns) for columns, _ in stream.steps(7)]
    assert [len(step) for step in found] == [7] * 25 + [5]
    rows = [(item, keys) for step in found for item, keys in zip(map(step.__getitem__, range(len(step))), step.keys)]

    def order(row):
        return repr(row[0])

    assert sorted(rows, key=order) == sorted(zip(map(whole.__getitem__, range(len(whole))), whole.keys), key=order)
    assert stream.dropped == whole.dropped and stream.left_out == 1
    assert stream.sample == items[:SAMPLE_SIZE]
    ids = [item.conversation_id for item, _ in rows]
    assert len(list(itertools.groupby(ids))) == 90 and ids != whole.conversation_ids  # 90 conversations


@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_the_shuffle_buffer(lab, buffer):
    items = lab.make_interactions(80)
    items = [replace(item, conversation_id="one" if n > 100 else None) for n, item in enumerate(items)]
    places = {id(item): place for place, item in enumerate(items)}
    order = [places[id(item)] for item in shuffled(iter(items), buffer, True, 3)]
    assert sorted(order) == list(range(160)) and (order == sorted(order)) == (buffer == 1)
    assert all(place - now < buffer for now, place in enumerate(order))
    assert order == [places[id(item)] for item in shuffled(iter(items), buffer, True, 3)]
    if buffer == 10:
        assert order != [places[id(item)] for item in shuffled(iter(items), buffer, True, 4)]


def test_any_position_is_gone_on_from(tmp_path, lab):
    """Also within the parts that are tokenized at once, behind one that is left out, and by other workers."""
    items = [*lab.make_interactions(150), BLANK, *lab.make_interactions(20, seed=5)]
    want = steps_of(opened(lab, tmp_path, Rows(items), shuffle_buffer=20), size=9)
    assert want[-1][1].trained == 340
    for number in (0, 1, 27, 28, 30, len(want) - 1):
        stream = opened(lab, tmp_path, Rows(items), shuffle_buffer=20)
        assert steps_of(stream, size=9, start=want[number][1]) == want[number + 1 :], number
        assert stream.left_out == 1
    apart = opened(lab, tmp_path, Rows(items), shuffle_buffer=20, tokenizer_workers=2)
    assert steps_of(apart, size=9) == want


def test_processes_share_a_step_out_as_they_do_with_data_that_lies_there(tmp_path, lab):
    """Together the same interactions as one process, each once, and as many micro-batches each; the last is uneven."""
    items = lab.make_interactions(11)

    def shares(processes, each, accumulated, index):
        stream = opened(lab, tmp_path, Rows(items))
        options = {"sharing": "conversation", "begun": lambda: (0, 0), "check": print}
        steps = StreamSteps(stream, StepShare(each, processes, accumulated, index), **options)
        parts = [InteractionDataset(columns) for columns, _ in stream.steps(8)]
        return [list(steps.micro_batches(part)) for part in parts]

    one = shares(1, 4, 2, 0)
    two = [shares(2, 2, 2, index) for index in (0, 1)]
    for number, step in enumerate(one):
        want = sorted(item.id for batch in step for item in batch["interactions"])
        mine = [[item.id for batch in process[number] for item in batch["interactions"]] for process in two]
        assert sorted(mine[0] + mine[1]) == want and not set(mine[0]) & set(mine[1])
        assert len(step) == len(two[0][number]) == len(two[1][number]) == 2
    assert len(one) == 3 and sum(len(batch["interactions"]) for batch in one[-1]) == 6


def test_no_more_is_read_than_the_steps_need(tmp_path, lab):
    rows = Rows(endless(lab))
    trainer = lab.make_trainer(tmp_path, interactions=rows, max_steps=3, shuffle_buffer=30)
    assert rows.taken == SAMPLE_SIZE
    trainer.train()
    assert len(losses_of(trainer)) == 3 and trainer.stream.interactions == 12
    assert rows.taken <= 30 + 256 + 2  # the buffer, what is tokenized at once, and a look at the next conversation


def test_memory_does_not_grow(tmp_path, lab, monkeypatch):
    """Python's own after 100 steps and after 300; the tokenizer's cache, which has a limit, is full before."""
    monkeypatch.setattr(encoding, "KEPT_CHARACTERS", 10_000)
    stream = opened(lab, tmp_path, Rows(itertools.cycle(lab.make_interactions(100))), shuffle_buffer=100)
    steps = stream.steps(8)
    tracemalloc.start()
    try:
        for _ in itertools.islice(steps, 100):
            pass
        before, _ = tracemalloc.get_traced_memory()
        for _ in itertools.islice(steps, 200):
            pass
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        steps.close()
    assert after - before < 100 * 1600, (before, after)  # far from what 1,600 interactions take


def test_a_dataset_of_the_hub(tmp_path, lab):
    """`datasets.IterableDataset`, rows as `fastsdpo prepare` writes them, trains as the interactions themselves."""
    datasets = pytest.importorskip("datasets")
    items = lab.make_interactions(8)
    rows = datasets.Dataset.from_list([row(item) for item in items]).to_iterable_dataset()
    settings = {"max_steps": 4, "shuffle_buffer": 6}
    trainers = [lab.make_trainer(tmp_path, interactions=source, **settings) for source in (rows, Rows(items))]
    for trainer in trainers:
        trainer.train()
    assert losses_of(trainers[0]) == losses_of(trainers[1]) and len(set(losses_of(trainers[0]))) == 4


@pytest.mark.parametrize("stop_at", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_resumed_equals_uninterrupted(tmp_path, lab, stop_at):
    items = [BLANK, *lab.make_interactions(10)]
    settings = {"max_steps": 5, "shuffle_buffer": 8, "save_strategy": "steps", "save_steps": 1000}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = lab.make_trainer(tmp_path / "whole", interactions=Rows(items), **settings)
    whole.train()
    part = lab.make_trainer(tmp_path / "part", interactions=Rows(items), callbacks=[StopAt(stop_at)], **settings)
    part.train()
    checkpoint = str(tmp_path / "part" / f"checkpoint-{stop_at}")
    resumed = lab.make_trainer(tmp_path / "part", model=lab.make_model(seed=5), interactions=Rows(items), **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses_of(resumed) == losses_of(whole) and len(losses_of(whole)) == 5
    epochs = [[entry["epoch"] for entry in trainer.state.log_history] for trainer in (resumed, whole)]
    assert epochs[0] == epochs[1]
    assert lab.largest_difference(lab.weights_of(resumed), lab.weights_of(whole)) == 0
    assert (resumed.stream.interactions, resumed.stream.left_out) == (20, 1)
    # A finished run has nothing to go on with.
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-5"))
    assert resumed.state.global_step == 5

    other = lab.make_trainer(tmp_path / "part", interactions=Rows(items), **{**settings, "shuffle_buffer": 9})
    with pytest.raises(ValueError, match="shuffle_buffer must be that of the checkpoint, 8, got 9"):
        other.train(resume_from_checkpoint=checkpoint)
    lying = lab.make_trainer(tmp_path / "part", interactions=items, **{**settings, "shuffle_buffer": None})
    with pytest.raises(ValueError, match=r"is of a run with a stream: go on with one \(--stream\)"):
        lying.train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_data_that_lay_there(tmp_path, lab):
    lab.make_trainer(tmp_path, max_steps=1, save_strategy="steps").train()
    stream = lab.make_trainer(tmp_path, interactions=Rows(lab.make_interactions()), max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1 is not of a run with a stream"):
        stream.train(resume_from_checkpoint=True)


def test_a_stream_that_ends_early(tmp_path, lab, caplog):
    """Its last step is short, as in data that lies there; then a log and a checkpoint, and that is said."""
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1000, "logging_steps": 5}
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = lab.make_trainer(tmp_path, interactions=Rows(lab.make_interactions(9)), **settings, **more)
    with caplog.at_level(logging.WARNING, "fastsdpo"):
        trainer.train()
    assert trainer.state.global_step == 3 and [entry["step"] for entry in trainer.state.log_history[:2]] == [1, 3]
    assert json.loads((tmp_path / "checkpoint-3" / "data.json").read_text())["stream"]["trained"] == 18
    assert "train_dataset ended after step 3 of 9 (18 interactions, 0 left out): training stops there" in caplog.text
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match="must hold an interaction, got none; 1 could not be tokenized"):
        lab.make_trainer(tmp_path / "none", interactions=Rows([BLANK]), max_steps=2).train()


def test_a_step_that_fails_is_taken_again(tmp_path, lab):
    """The checkpoint of the state before a loss that is not finite is at the start of that step."""
    trainer = lab.make_trainer(tmp_path, interactions=Rows(lab.make_interactions(9)), max_steps=4, shuffle_buffer=5)
    trainer.train()
    want = trainer.stream.positions
    assert list(want) == [3, 4] and (want[3].trained, want[4].trained) == (12, 16)
    trainer.state.global_step = 3
    trainer.save_state_to(str(tmp_path / "before"))
    assert json.loads((tmp_path / "before" / "data.json").read_text())["stream"]["trained"] == 12


def test_leaks_are_found_as_they_come(tmp_path, lab, caplog):
    items = lab.make_interactions(20)
    settings = {"eval_dataset": items[36:38], "max_steps": 10, "shuffle_buffer": 1}
    trainer = lab.make_trainer(tmp_path, interactions=Rows(items), **settings)
    with pytest.raises(ValueError, match=r"2 of its 2 interactions are in train_dataset.*allow_leaks=True"):
        trainer.train()
    assert trainer.state.global_step == 9
    allowed = lab.make_trainer(tmp_path, interactions=Rows(items), allow_leaks=True, **settings)
    with caplog.at_level(logging.WARNING, "fastsdpo"):
        allowed.train()
    assert allowed.state.global_step == 10 and "allow_leaks is set" in caplog.text
    with caplog.at_level(logging.WARNING, "fastsdpo"):
        allowed.evaluate(lab.make_interactions(1, seed=7))
    assert "whether it holds interactions that were trained on is not known: train_dataset is a stream" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "is a stream, whose length is not known, so max_steps must be given, got -1"),
        ({"token_cache": "here"}, "token_cache must not be given where train_dataset is a stream, got 'here'"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers must not be given where train_dataset is a stream"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1 or None, got 0"),
    ],
)
def test_settings_that_a_stream_has_no_use_for(tmp_path, lab, settings, message):
    with pytest.raises(ValueError, match=message):
        lab.make_trainer(tmp_path, interactions=Rows(lab.make_interactions()), **{"max_steps": 2, **settings})


def test_what_is_no_stream(tmp_path, lab):
    with pytest.raises(ValueError, match="shuffle_buffer needs a train_dataset that is a stream"):
        lab.make_trainer(tmp_path, shuffle_buffer=5)
    lab.write_rows(tmp_path / "data.jsonl", lab.make_interactions())
    several = InteractionDataset.from_source([tmp_path / "data.jsonl"] * 2, lab.make_tokenizer(), lab.TEMPLATE)
    assert len(several) == 24
    with pytest.raises(TypeError, match=r"train_dataset\[12\] must be an interaction, got str"):
        lab.make_trainer(tmp_path, interactions=Rows([*lab.make_interactions(), "text"]), max_steps=1)
    trainer = lab.make_trainer(tmp_path, interactions=Rows([*lab.make_interactions(40), "text"]), max_steps=1)
    with pytest.raises(TypeError, match=r"train_dataset\[80\] must be an interaction, got str"):
        trainer.train()
    with pytest.raises(TypeError, match="eval_dataset must be there whole, and no stream"):
        trainer.evaluate(trainer.train_dataset)


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    """``model/`` and the same 24 interactions in one file, in two of which one is packed, and as Parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("stream")
    lab.save(folder / "model")
    items = lab.make_interactions(12)
    lab.write_rows(folder / "data.jsonl", items)
    rows = (folder / "data.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "parts").mkdir()
    (folder / "parts" / "a.jsonl").write_bytes(b"".join(rows[:10]))
    (folder / "parts" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[10:])))
    pq.write_table(pa.Table.from_pylist([row(item) for item in items]), folder / "data.parquet")
    return folder


def arguments(place, output, *more):
    """Without the data."""
    return command(place, output, "--stream", "--max-steps", "4", "--shuffle-buffer", "8", *more)[1:]


def reported(output):
    return [entry["loss"] for entry in report_of(output)["history"] if "loss" in entry]


def test_the_command_reads_files(place, tmp_path, capsys):
    sources = {"plain": ["data.jsonl"], "two": ["parts/a.jsonl", "parts/b.jsonl.gz"], "parquet": ["data.parquet"]}
    for name, files in sources.items():
        data = [str(place / file) for file in files]
        assert main([*data, *arguments(place, tmp_path / name, "--show", "1")]) == 0, name
        assert reported(tmp_path / name) == reported(tmp_path / "plain"), name
    printed = capsys.readouterr().out
    assert "a stream: 4 optimizer steps of 4 interactions, drawn from a buffer of 8; its lengths, packs and" in printed
    assert "c0:0: " in printed
    report = report_of(tmp_path / "plain")
    assert (report["interactions"], report["left_out"], report["left_out_of_stream"]) == (16, [], 0)
    card = (tmp_path / "plain" / "model" / "README.md").read_text()
    assert "| training | 16 interactions, read as a stream |" in card
    # The same run again, from the file that it left.
    again = ["--config", str(tmp_path / "two" / "run.yaml"), "-o", str(tmp_path / "again"), "--quiet"]
    assert main(again) == 0 and reported(tmp_path / "again") == reported(tmp_path / "two")


@pytest.fixture
def piped(place):
    """The file as this process's standard input, from a pipe."""
    before = os.dup(0)
    writer = subprocess.Popen(["cat", str(place / "data.jsonl")], stdout=subprocess.PIPE)
    os.dup2(writer.stdout.fileno(), 0)
    yield
    os.dup2(before, 0)
    writer.stdout.close()
    writer.wait()


def test_the_command_reads_standard_input_and_a_dataset_by_name(place, tmp_path, lab, monkeypatch, piped):
    """A name is a Hugging Face dataset, which streams."""
    datasets = pytest.importorskip("datasets")
    rows = [row(item) for item in lab.make_interactions(12)]

    def load_dataset(name, config, *, split, streaming):
        assert (name, split, streaming) == ("org/rows", "train", True)
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, data in (("file", place / "data.jsonl"), ("pipe", "-"), ("hub", "org/rows")):
        more = ("--quiet", "--set", "teacher_check=0", "--set", "tokenizer_workers=1")
        assert main([str(data), *arguments(place, tmp_path / name, *more)]) == 0, name
        assert reported(tmp_path / name) == reported(tmp_path / "file"), name


def test_the_command_ends_with_the_stream_and_goes_on(place, tmp_path, caplog):
    more = ["--set", "save_strategy=steps", "--schedule", "constant", "--set", "teacher_check=0"]
    data = str(place / "data.jsonl")
    assert main([data, *arguments(place, tmp_path / "whole", *more, "--max-steps", "8")]) == 0
    assert "train_dataset ended after step 6 of 8 (24 interactions, 0 left out): training stops there" in caplog.text
    assert main([data, *arguments(place, tmp_path / "part", *more, "--max-steps", "2")]) == 0
    assert main([data, *arguments(place, tmp_path / "part", *more, "--max-steps", "8", "--resume")]) == 0
    for output in (tmp_path / "whole", tmp_path / "part"):
        assert (report_of(output)["steps"], report_of(output)["interactions"]) == (6, 24)
    assert reported(tmp_path / "part") == reported(tmp_path / "whole")


def test_options_of_a_stream_alone(place, tmp_path, capsys):
    words = command(place, tmp_path, "--max-steps", "4")[1:]
    assert main(["-", *words]) == 1
    assert "- (standard input) needs --stream" in capsys.readouterr().err
    assert main(["-", str(place / "data.jsonl"), "--stream", *words]) == 1
    assert "- (standard input) must be given alone" in capsys.readouterr().err
    assert main([str(place / "none.jsonl"), "--stream", *words]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_bad_row_is_named_when_it_comes(place, tmp_path, capsys, lab):
    text = (place / "data.jsonl").read_text() * 4
    rows = text.splitlines(keepends=True)
    rows[90] = '{"prompt": 3}\n'
    (tmp_path / "bad.jsonl").write_text("".join(rows))
    more = ("--max-steps", "40", "--set", "group_by_conversation=false")
    assert main([str(tmp_path / "bad.jsonl"), *arguments(place, tmp_path / "out", *more)]) == 1
    assert "bad.jsonl:91: " in capsys.readouterr().err.splitlines()[-1]
