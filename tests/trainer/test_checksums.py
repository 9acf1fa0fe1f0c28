"""A checkpoint's sums come from what is written, and not from reading it back."""

import json

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
import transformers.modeling_utils

from fastsdpo.trainer import checksums
from fastsdpo.trainer.checkpoint_folders import check_output_folder
from fastsdpo.trainer.checksums import Recorder, SummedFile, damage_of, sum_file


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_is_written_is_what_the_files_hold(tmp_path):
    """By each of the functions that write checkpoints, with dtypes, views and sizes that their formats reorder."""
    tensors = {"b": torch.randn(7, 3).bfloat16(), "a": torch.tensor(2.5), "c": torch.arange(5), "d": torch.zeros(0, 4)}
    tensors["e"] = torch.ones(3, dtype=torch.uint8)
    recorder = Recorder()
    with recorder.recording():
        torch.save({"state": tensors, "step": 3}, tmp_path / "optimizer.pt")
        transformers.modeling_utils.safe_save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        writer = distributed_checkpoint.FileSystemWriter(tmp_path / "shards")
        distributed_checkpoint.save({"model": tensors}, storage_writer=writer, no_dist=True)
    torch.save(tensors, tmp_path / "later.pt")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"later.pt", ".metadata"}
    assert len(names) == 3 and "__0_0.distcp" in names
    found = {path: recorder.sums[str(path)] for path in tmp_path.rglob("*") if path.name in names}
    assert found == {path: sum_file(path) for path in found}
    assert torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]["a"] == 2.5


def test_a_file_that_is_not_written_straight_has_no_sum(tmp_path):
    sums: checksums.Sums = {}
    with SummedFile(tmp_path / "file", sums) as file:
        file.write(b"abc")
        file.seek(0)
        file.write(b"x")
    assert sums == {} and (tmp_path / "file").read_bytes() == b"xbc"


def test_no_large_file_of_a_checkpoint_is_read_back(tmp_path, lab, monkeypatch):
    read = []

    def noted(path, sync=False):
        read.append(path.stat().st_size)
        return sum_file(path, sync)

    monkeypatch.setattr(checksums, "sum_file", noted)
    made = lab.make_trainer(tmp_path, teacher="ema", max_steps=1, save_strategy="steps", save_steps=1)
    made.train()
    written = json.loads((tmp_path / "checkpoint-1" / checksums.CHECKSUMS).read_text())
    large = {name for name, row in written.items() if row["bytes"] > 20_000}
    assert large >= {"model.safetensors", "optimizer.pt", "teacher_ema.safetensors"}
    assert max(read) < min(written[name]["bytes"] for name in large)
    read.clear()
    assert [damage_of(tmp_path / "checkpoint-1", process, 3) for process in range(3)] == [None] * 3
    assert len(read) == len(written), "each file by one process"
    shards = tmp_path / "checkpoint-1" / "optimizer.pt"
    shards.write_bytes(shards.read_bytes()[:-1] + b"?")
    assert "optimizer.pt" in str([damage_of(tmp_path / "checkpoint-1", process, 3) for process in range(3)])


def test_a_checkpoint_without_room_is_not_begun(tmp_path, lab, monkeypatch):
    made = lab.make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    asked = []

    def full(folder, needed):
        asked.append(needed)
        check_output_folder(folder, needed if len(asked) == 1 else 2**60)

    monkeypatch.setattr("fastsdpo.trainer.checkpoints.check_output_folder", full)
    with pytest.raises(OSError, match=r"checkpoint-1 cannot be written: the output folder .* MB free"):
        made.train()
    assert not list(tmp_path.glob("checkpoint*"))
