"""Hidden states from another process give the losses and gradients of one process; others are refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastsdpo import linear_sdpo_loss
from fastsdpo.integrations.hidden_states import pack, receive, unpack
from tests.integrations.hidden_states_worker import D, Head, T, V, teacher

ROOT = str(Path(__file__).parents[2])


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path):
    store, listener = str(tmp_path / "store"), socket.create_server(("127.0.0.1", 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.hidden_states_worker", store, str(listener.getsockname()[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        cwd=ROOT,
    )
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=0, world_size=2)
        try:
            messages = [receive(1)]
        finally:
            dist.destroy_process_group()
        listener.settimeout(60)
        connection = listener.accept()[0]
        with listener, connection, connection.makefile("rb") as stream:
            messages.append(stream.read())
        assert child.wait(60) == 0
    finally:
        child.kill()
    assert messages[0] == messages[1] and len(messages[0]) < 4 * T * D + 8 * T + 600

    head, hidden, ids = teacher()
    student_head = torch.randn(V, D, requires_grad=True)
    student = torch.randn(T, D, requires_grad=True)

    def loss_and_gradients(states):
        options = {"teacher_weight": head.weight, "teacher_bias": head.bias, "softcap": 30.0, "logit_scale": 0.5}
        bias = torch.zeros(V)
        out = linear_sdpo_loss(student, states, student_head, ids, mode="full", alpha=0.5, bias=bias, **options)
        return [out.loss, *torch.autograd.grad(out.loss, (student, student_head))]

    want = loss_and_gradients(hidden)
    found = loss_and_gradients(unpack(messages[0], head, ids, head_name="step 7"))
    assert all(torch.equal(a, b) for a, b in zip(found, want)) and want[1].norm() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_travel_as_they_are(dtype):
    head, hidden, ids = teacher()
    head = head._replace(weight=head.weight.to(dtype), bias=None)
    found = unpack(pack(hidden.to(dtype), ids, head), head, ids)
    assert found.dtype == dtype and torch.equal(found, hidden.to(dtype))
    assert unpack(pack(hidden[:0], ids[:0], head), head, ids[:0]).shape == (0, D)


def other(**changes):
    return lambda head, ids: (head._replace(**{name: change(head) for name, change in changes.items()}), ids, "")


# What the receiver has in place of (head, ids, head_name), and the error's words.
REFUSED = {
    "another model's head": (other(weight=lambda h: h.weight.roll(1, 0)), "it is another head"),
    "no bias": (other(bias=lambda h: None), "it is another head"),
    "no softcap": (other(softcap=lambda h: None), "log-probs of the first 8 tokens to 0.001 nats"),
    "no scale": (other(logit_scale=lambda h: 1.0), "it is another head"),
    "a step later": (other(weight=lambda h: h.weight + 0.01 * torch.randn(V, D)), "it is another head"),
    "padded": (other(weight=lambda h: torch.cat([h.weight, h.weight])), r"must have the sender's 97 rows, got 194"),
    "width": (other(weight=lambda h: h.weight[:, 1:]), r"\[T, D\] with the head's D = 15, got \[23, 16\]"),
    "name": (lambda head, ids: (head, ids, "step 8"), "head_name must be the sender's '', got 'step 8'"),
    "order": (lambda head, ids: (head, ids.flip(0), ""), "the first difference: 0"),
    "fewer": (lambda head, ids: (head, ids[1:], ""), r"target_ids must be the 23 .*, got \(22,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_head_or_other_tokens(name):
    change, words = REFUSED[name]
    head, hidden, ids = teacher()
    message = pack(hidden, ids, head)
    head, ids, head_name = change(head, ids)
    with pytest.raises(ValueError, match=words):
        unpack(message, head, ids, head_name=head_name)


def test_bytes_that_are_no_message():
    head, hidden, ids = teacher()
    message = pack(hidden, ids, head)
    for damaged in (b"", b"\x80\x04K\x01.", message[:-1], message.replace(b"states.1", b"states.9")):
        with pytest.raises(ValueError, match="unpack: message must"):
            unpack(damaged, head, ids)
    for wrong, error, words in (
        ({"hidden_states": hidden.double()}, TypeError, "hidden_states must be one of"),
        ({"hidden_states": hidden[None]}, ValueError, r"shape \[T, D\]"),
        ({"target_ids": ids[1:]}, ValueError, r"target_ids must have the shape \[T\] = \[23\], got \[22\]"),
        ({"target_ids": ids + V}, ValueError, r"target_ids must lie in \[0, 97\)"),
        ({"head": Head(head.weight[:, :3])}, ValueError, "D = 3"),
    ):
        with pytest.raises(error, match=words):
            pack(**{"hidden_states": hidden, "target_ids": ids, "head": head, **wrong})
