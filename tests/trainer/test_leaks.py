"""Held-out interactions whose conversation is trained on: refused with counts, or reported."""

import dataclasses

import pytest

from fastsdpo.data import Interaction
from fastsdpo.train import main
from fastsdpo.trainer.data import InteractionDataset
from tests.trainer.conftest import command


def talk(name, turns=3):
    """The interactions of one conversation, each follow-up the next prompt's last message."""
    prompt = [{"role": "user", "content": f"w1 {name}"}]
    found = []
    for turn in range(turns):
        answer, followup = f"w2 w{turn} {name}", f"w3 w{turn} {name}"
        found.append(Interaction(prompt, answer, followup, f"{name}:{turn}", name))
        prompt = [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": followup}]
    return found


def renamed(item, **changes):
    return dataclasses.replace(item, id=None, conversation_id=None, **changes)


# Held out beside the conversations w10 (turns 0 and 2) and w11 (all): (interactions, counts).
TRAIN = [talk("w10")[0], talk("w10")[2], *talk("w11")]
LATER = talk("w10", 4)[3]
CASES = {
    "the same": ([renamed(talk("w11")[1])], (1, 1, 1)),
    "the same, in white space": ([renamed(talk("w11", 1)[0], completion="w2 w0 w11\n")], (1, 1, 1)),
    "a turn of a conversation": ([renamed(talk("w10")[1]), *talk("w12")], (1, 0, 1)),
    "a later turn": ([renamed(talk("w11", 5)[4])], (1, 0, 1)),
    "by the id, with a window of its history": ([dataclasses.replace(LATER, prompt=LATER.prompt[4:])], (1, 0, 1)),
    "two of three": ([*talk("w10")[1:], *talk("w13", 1)], (2, 1, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_leaks_are_refused_with_counts(tmp_path, lab, case):
    held_out, (total, same, conversation) = CASES[case]
    with pytest.raises(ValueError) as caught:
        lab.make_trainer(tmp_path, interactions=TRAIN, eval_dataset=held_out)
    for text in (
        "eval_dataset must hold no conversation that is trained on, got "
        f"{total} of its {len(held_out)} interactions are in train_dataset: {same} themselves, of "
        f"{conversation} another part of the conversation",
        "allow_leaks=True to go on",
    ):
        assert text in str(caught.value)


def test_what_only_looks_alike_is_not_refused(tmp_path, lab):
    """Conversations numbered anew in each file; the same greeting and answer to it."""
    other = [dataclasses.replace(item, conversation_id="w10") for item in talk("w20")]
    greeting = [dataclasses.replace(TRAIN[0], followup="w30", conversation_id="w40")]
    trainer = lab.make_trainer(tmp_path, interactions=TRAIN, eval_dataset=[*other, *greeting])
    assert len(trainer.eval_dataset) == 4


def test_tokens_and_sets_given_to_evaluate(tmp_path, lab, caplog):
    trainer = lab.make_trainer(tmp_path, interactions=TRAIN)
    tokens = [dataclasses.replace(item, conversation_id=None) for item in trainer.train_dataset]
    forms = (tokens[:1], InteractionDataset(tokens[:1]), {"a": tokens[:1]})
    refused = "1 of its 1 interactions are in train_dataset: 1 themselves"
    for held_out in forms:
        with pytest.raises(ValueError, match=refused):
            trainer.evaluate(held_out)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0  # asked for by name
    for held_out in forms:
        with pytest.raises(ValueError, match=refused):
            lab.make_trainer(tmp_path, interactions=TRAIN, eval_dataset=held_out)
    trainer = lab.make_trainer(tmp_path, interactions=TRAIN, eval_dataset=TRAIN[:1], allow_leaks=True)
    assert "eval_dataset is no measure of what was learned: 1 of its 1" in caplog.text
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_command(tmp_path, lab, capsys, caplog):
    def without_conversations(items):
        return [dataclasses.replace(item, conversation_id=None) for item in items]

    lab.make_place(tmp_path, without_conversations(TRAIN), without_conversations(talk("w10")[1:2]))
    argv = command(tmp_path, tmp_path / "out", "--dry-run")
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "1 of its 1 interactions are in train_dataset" in error and error.count("--allow-leaks") == 1
    assert main([*argv, "--allow-leaks"]) == 0
    assert "5 interactions of 5 conversations; 1 held out" in capsys.readouterr().out
    assert "1 of its 1 interactions are in train_dataset" in caplog.text
