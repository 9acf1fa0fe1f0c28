"""What an older version wrote still works: public signatures, data files, checkpoints. See `tests/kept/make.py`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.kept import make as made

KEPT = Path(__file__).parent / "kept"
GONE = {
    # Fields that nothing read; `fastsdpo.prefix.ResponseLabels` has them.
    "fastsdpo.prefix.Plan": {"target_ids", "sequence_ids", "position_in_response"},
    # Where to go on in the middle of the sources, which `prepare` did after a kill; it starts anew now.
    "fastsdpo.data.load_conversations": {"position"},
    "fastsdpo.load_conversations": {"position"},
    "fastsdpo.data.LoadReport": {"position"},
    # What is said where no other follow-up is found: one of three questions, the nearest in length.
    "fastsdpo.signal.choose_unrelated": {"default"},
    # The command, which `fastsdpo signal` still is, and the picture that it no longer draws.
    "fastsdpo.signal.main": None,
    "fastsdpo.signal.render_png": None,
}
EXPECTED = json.loads((KEPT / "expected.json").read_text())


def test_public_names_take_the_same_parameters():
    now = made.signatures()
    for name, parameters in EXPECTED["signatures"].items():
        gone = GONE.get(name, set())
        assert (name in now) == (gone is not None), name
        assert gone is None or set(parameters) - set(now[name]) == gone, name


def test_prepare_writes_the_same_rows(tmp_path):
    made.prepare([str(KEPT / "conversations.jsonl")], str(tmp_path / "interactions.jsonl"))
    found, kept = (folder.joinpath("interactions.jsonl").read_text().splitlines() for folder in (tmp_path, KEPT))
    assert [json.loads(line) for line in found] == [json.loads(line) for line in kept]


@pytest.mark.parametrize("name", ["offline", "online"])
def test_a_run_goes_on_from_its_checkpoint(tmp_path, name):
    """The same last two losses, with the teachers' weights and, online, with the answers of the checkpoint."""
    torch.set_num_threads(1)
    shutil.copytree(KEPT / name, tmp_path / name)
    trainer = (
        made.online(tmp_path / name)
        if name == "online"
        else made.offline(tmp_path / name, KEPT / "interactions.jsonl")
    )
    trainer.train(resume_from_checkpoint=True)
    assert made.losses(trainer) == pytest.approx(EXPECTED["losses"][name], rel=1e-4)
