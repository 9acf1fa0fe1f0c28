"""The teacher's process: one message through a torch.distributed group, the same through a socket.

Usage: hidden_states_worker.py STORE PORT   (see test_hidden_states.py)
"""

import socket
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastsdpo.integrations.hidden_states import pack, send

V, D, T = 97, 16, 23


class Head(NamedTuple):
    """The fields of `fastsdpo.prefix.HeadParameters`, which needs transformers."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def teacher():
    """``(head, hidden states, target ids)`` of a teacher that both processes can make."""
    torch.manual_seed(11)
    head = Head(torch.randn(V, D), torch.randn(V), 30.0, 0.5)
    layer, ids = torch.nn.Linear(D, D), torch.randint(V, (T,))
    with torch.no_grad():
        return head, layer(torch.randn(T, D)).tanh(), ids


if __name__ == "__main__":
    store, port = sys.argv[1:]
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=1, world_size=2)
    head, hidden, ids = teacher()
    message = pack(hidden, ids, head, head_name="step 7")
    send(message, 0)
    with socket.create_connection(("127.0.0.1", int(port))) as connection:
        connection.sendall(message)
    dist.destroy_process_group()
