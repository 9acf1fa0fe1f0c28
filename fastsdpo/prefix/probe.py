"""The interactions on which a model is tried before training, long enough for all that it does by length."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastsdpo.prefix.attention import attention_windows
from fastsdpo.prefix.model import causal_lm, decoder_of, model_device
from fastsdpo.prefix.recurrent import recurrent_mixers
from fastsdpo.prefix.refusals import sharing_limit

# Settings of a configuration that name a number of tokens, beyond which a layer does something else.
LENGTHS = (
    "attention_chunk_size",
    "attention_window_size",
    "block_size",
    "chunk_size",
    "floor_scale",
    "index_topk",
    "local_attention",
    "mamba_chunk_size",
    "window_size",
)
LEAST_RECURRENT = 160  # two chunks of 64, in which delta rules run
LEAST_ON_GPU = 320  # two blocks of 128 of the attention kernels


class ProbeItem(NamedTuple):
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]


def probe_ids(model: nn.Module, count: int) -> list[int]:
    """``count`` token ids to try a model on: the same every time, and all different in a large vocabulary."""
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    return [(7 + 37 * n) % vocabulary for n in range(count)]


def sharing_probe(model: nn.Module, longest: int) -> list[ProbeItem]:
    """Nested histories, branches, a branch in a branch, tokens alone between branches, and very short prompts.

    Where `probe_length` says so, two more are longer. Their histories are one, and their branches end it.
    """
    count = probe_length(model, longest)
    ids = probe_ids(model, max(120, count))
    first, second, short = ids[:24], ids[:40], ids[100:101]
    items = [
        ProbeItem(first, first + ids[80:88], ids[24:36]),
        ProbeItem(second, second[:-2] + ids[84:96], ids[60:72]),
        ProbeItem(second, second + ids[90:96], ids[60:66] + ids[72:80]),
        # One token, then another branch: a recurrent layer has a path of its own for one token and states.
        ProbeItem([*first, ids[96]], [*first, ids[96], ids[97]], ids[110:113]),
        ProbeItem([*first, ids[98]], [*first, ids[98], ids[96], ids[99]], ids[112:114]),
        # Shorter than the kernel of a convolution.
        ProbeItem(short, [*short, ids[102]], ids[103:108]),
        ProbeItem([*short, ids[103]], ids[101:103], ids[108:110]),
    ]
    if count > 60:
        history = ids[: count - 20]
        items.append(ProbeItem(history, history[:-6] + ids[60:66], ids[80:92]))
        items.append(ProbeItem(history + ids[40:46], history + ids[70:75], ids[100:108]))
    return items


def probe_length(model: nn.Module, longest: int) -> int:
    """How many tokens meet all that the model does by length, in sequences of at most ``longest`` tokens; 0: any.

    Windows, chunks and the counts of keys that an indexer leaves are met where such sequences meet them.
    """
    causal = causal_lm(model)
    config = causal.config.get_text_config()
    sizes = [getattr(window, "size", window) for window in attention_windows(config).values()]
    sizes += [getattr(config, name, None) for name in LENGTHS]
    limit = sharing_limit(model)
    most = min(
        longest,
        getattr(config, "max_position_embeddings", None) or longest,
        longest if limit is None else limit.positions,
    )
    wanted = [size + 40 for size in sizes if isinstance(size, int) and 0 < size < most]
    if model_device(model).type == "cuda":
        wanted.append(LEAST_ON_GPU)
    if recurrent_mixers(decoder_of(causal)):
        wanted.append(LEAST_RECURRENT)
    return min(max(wanted, default=0), most)
