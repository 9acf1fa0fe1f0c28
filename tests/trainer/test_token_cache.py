"""Tokens of data files: the same from any number of processes, kept, and found again."""

import json
import os
import shutil

import pytest

from fastsdpo.data import token_cache
from fastsdpo.data.tokenizing import Tokenization, tokenize_chunks
from fastsdpo.train import main
from fastsdpo.trainer.data import InteractionDataset


@pytest.fixture(scope="module")
def data(tmp_path_factory, lab):
    """A file of 24 interactions, of which one cannot be tokenized."""
    path = tmp_path_factory.mktemp("tokens") / "data.jsonl"
    lab.write_rows(path, lab.make_interactions(12))
    row = json.loads(path.read_text().splitlines()[0])
    row["user_response"]["content"] = "\u200b"  # nothing to see: it cannot be tokenized
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return path


def contents(dataset):
    numbers = (dataset.tokens, dataset.ends, dataset.keys, dataset.history_keys, dataset.message_keys)
    names = (dataset.ids, dataset.conversation_ids)
    return [list(map(int, column)) for column in numbers], [list(column) for column in names], dataset.sample


def read(data, lab, **options):
    options = {"cache": None, "workers": 1, **options}
    return InteractionDataset.from_source(data, lab.make_tokenizer(), "note", **options)


def test_kept_or_not_and_by_any_number_of_processes(data, lab, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsdpo.data.tokenizing.CHUNK", 5)
    plain = read(data, lab)
    assert len(plain) == 24 and len(plain.dropped) == 1
    folder = tmp_path / "tokens"
    made = read(data, lab, cache=str(folder), workers=2)
    found = read(data, lab, cache=str(folder))
    for dataset in (made, found):
        assert contents(dataset) == contents(plain) and dataset.dropped == plain.dropped
        assert [dataset[i] for i in range(24)] == [plain[i] for i in range(24)]
        assert list(dataset.groups(True)) == list(plain.groups(True)) and dataset.ids[-3:] == plain.ids[-3:]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


def test_what_decides_the_tokens_names_them(data, lab, tmp_path):
    folder = tmp_path / "tokens"
    copy = tmp_path / "copy.jsonl"
    shutil.copy(data, copy)

    def parts():
        return {path.name for path in folder.iterdir() if path.is_dir()}

    first = read(copy, lab, cache=str(folder))
    assert len(parts()) == 1
    assert read(copy, lab, cache=str(folder), max_completion_length=2).tokens.shape != first.tokens.shape
    other = lab.make_tokenizer()
    other.chat_template = "w1 " + other.chat_template
    changed = InteractionDataset.from_source(copy, other, "note", cache=str(folder))
    assert changed[0].prompt_ids != first[0].prompt_ids
    os.utime(copy, ns=(1, 1))
    read(copy, lab, cache=str(folder))
    assert len(parts()) == 4
    # A clock in the template: tokens of another day would be found.
    other.chat_template = "{{ strftime_now('%Y') }}" + other.chat_template
    assert token_cache.token_key([copy], other, "note", {}) is None
    assert token_cache.token_key([copy], other, "note", {"chat_template_date": "2026-01-31"}) is not None


def test_damaged_tokens_are_made_again(data, lab, tmp_path, caplog):
    folder = tmp_path / "tokens"
    want = contents(read(data, lab, cache=str(folder)))
    (tokens,) = folder.glob("*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert contents(read(data, lab, cache=str(folder))) == want
    assert "are damaged and are made again" in caplog.text
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="--token-cache"):
        read(data, lab, cache=str(blocked))


def test_a_run_reads_what_a_dry_run_kept(data, lab, tmp_path, monkeypatch):
    model, folder = tmp_path / "model", tmp_path / "tokens"
    lab.save(model)
    options = [str(data), "--model", str(model), "--template", "note {o}", "--cpu", "--batch-size", "8", "--quiet"]
    options += ["--max-steps", "2", "--set", "save_strategy=no"]
    assert main([*options, "-o", str(tmp_path / "a"), "--dry-run", "--token-cache", str(folder)]) == 0
    monkeypatch.setattr("fastsdpo.trainer.data.tokenize_chunks", None)  # nothing is tokenized
    assert main([*options, "-o", str(tmp_path / "b"), "--token-cache", str(folder)]) == 0
    monkeypatch.undo()
    assert main([*options, "-o", str(tmp_path / "c"), "--token-cache", "none"]) == 0
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in "bc"]
    assert weights[0] == weights[1]


def test_a_process_that_dies_is_told(lab):
    class Dies:
        """A tokenizer that ends the process it is sent to."""

        def __init__(self):
            self.here = os.getpid()
            self.tokenizer = lab.make_tokenizer()

        def __getattr__(self, name):
            return getattr(self.__dict__["tokenizer"], name)

        def __reduce__(self):
            return os._exit, (7,)

        def __call__(self, *args, **kwargs):
            return self.tokenizer(*args, **kwargs)

    chunks = tokenize_chunks(lab.make_interactions(), Tokenization(Dies(), "note", {}), workers=2)
    with pytest.raises(RuntimeError, match="ended with status 7 before its work was done"):
        list(chunks)
