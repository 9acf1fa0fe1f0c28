"""A teacher behind an inference server: vLLM's ``prompt_logprobs`` as teacher of `fastsdpo.sdpo_loss`.

The server gets the teacher's prompt followed by the response, as token ids, and scores it
(``SamplingParams(prompt_logprobs=K, max_tokens=1)``, or ``"prompt_logprobs": K`` in the JSON of its HTTP server). For
every token it returns the K most likely tokens and the token itself:

    [None, {id: Logprob(logprob, rank, decoded_token), ...}, ...]      objects, from `LLM.generate`
    [null, {"id": {"logprob": ..., "rank": ..., ...}, ...}, ...]       JSON, ids as strings

vLLM scores with temperature 1 unless it runs with ``logprobs_mode="processed_logprobs"``. The loss must have the
temperature that the log-probs were made with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsdpo.integrations._distillation import IGNORE_INDEX

# Some servers round log-probs to bfloat16 or to a few decimals.
ROUNDING = 1e-2


class ServedTeacher(NamedTuple):
    """The teacher's scores as `sdpo_loss` takes them: one row per response, padded on the right.

    Attributes:
        target_ids: ``[B, T]`` int64, the responses' tokens, -100 in the padding.
        teacher_logps: ``[B, T]`` float32, the teacher's log-prob of each, 0 in the padding; for
            ``mode="sampled_token"``.
        teacher_topk: ids and log-probs ``[B, T, K]``, most likely first, for ``mode="topk"``; None where ``topk``
            was None.
    """

    target_ids: Tensor
    teacher_logps: Tensor
    teacher_topk: tuple[Tensor, Tensor] | None


def teacher_from_prompt_logprobs(
    prompt_logprobs: Sequence[Sequence[Mapping[Any, Any] | None]],
    token_ids: Sequence[Sequence[int]],
    completion_lengths: Sequence[int],
    *,
    topk: int | None = None,
    device: torch.device | str | None = None,
) -> ServedTeacher:
    """Reads and checks the scores of several sequences.

    Args:
        prompt_logprobs: one list per sequence, an entry per token, in one of the two layouts above.
        token_ids: the sequences that were sent, teacher prompt and response.
        completion_lengths: how many of each sequence's last tokens are the response; >= 1.
        topk: also read the K most likely tokens of every position.
        device: of the results.

    Returns:
        `ServedTeacher`.

    Raises:
        ValueError: numbers of sequences or tokens that differ, a first entry that is not None, an entry without its
            own token or with fewer than ``topk`` tokens, a number that is no log-probability. The message names
            sequence and position.
        TypeError: an entry in another layout.
    """
    name = "teacher_from_prompt_logprobs"
    counts = (len(prompt_logprobs), len(token_ids), len(completion_lengths))
    if len(set(counts)) != 1:
        raise ValueError(
            f"{name}: prompt_logprobs, token_ids and completion_lengths must have one entry per "
            f"sequence, got {counts[0]}, {counts[1]} and {counts[2]}"
        )
    if topk is not None and (isinstance(topk, bool) or not isinstance(topk, int) or topk < 1):
        raise ValueError(f"{name}: topk must be a positive integer or None, got {topk!r}")
    sequences = [
        _read_sequence(f"{name}: sequence {number}", entries, ids, length, topk)
        for number, (entries, ids, length) in enumerate(zip(prompt_logprobs, token_ids, completion_lengths))
    ]
    shape = len(sequences), max(map(int, completion_lengths), default=0)
    target_ids = torch.full(shape, IGNORE_INDEX)
    logps = torch.zeros(shape)
    ids = top = None
    if topk is not None:
        # The loss checks padding too: its ids must be distinct and its log-probs those of a distribution.
        ids = torch.arange(topk).expand(*shape, topk).clone()
        top = torch.full((*shape, topk), -math.log(topk + 1))
    for row, (sequence, tokens, length) in enumerate(zip(sequences, token_ids, completion_lengths)):
        target_ids[row, :length] = torch.tensor(list(tokens)[-length:])
        logps[row, :length] = torch.tensor([logp for logp, _ in sequence])
        if ids is not None and top is not None:
            ids[row, :length] = torch.tensor([[i for i, _ in best] for _, best in sequence])
            top[row, :length] = torch.tensor([[p for _, p in best] for _, best in sequence])
    pair = None if ids is None or top is None else (ids.to(device), top.to(device))
    return ServedTeacher(target_ids.to(device), logps.to(device), pair)


def teacher_from_outputs(
    outputs: Sequence[Any],
    completion_lengths: Sequence[int],
    *,
    topk: int | None = None,
    device: torch.device | str | None = None,
) -> ServedTeacher:
    """`teacher_from_prompt_logprobs` of vLLM's ``RequestOutput`` objects, which carry their tokens."""
    for number, output in enumerate(outputs):
        if getattr(output, "prompt_logprobs", None) is None:
            raise ValueError(
                f"teacher_from_outputs: output {number} must have prompt_logprobs, got none; "
                "ask for them with SamplingParams(prompt_logprobs=...)"
            )
    return teacher_from_prompt_logprobs(
        [output.prompt_logprobs for output in outputs],
        [output.prompt_token_ids for output in outputs],
        completion_lengths,
        topk=topk,
        device=device,
    )


def _read_sequence(
    where: str, entries: Sequence[Mapping[Any, Any] | None], token_ids: Sequence[int], length: int, topk: int | None
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each of the last ``length`` tokens: its log-prob and the K most likely ``(id, log-prob)``."""
    if entries is None or len(entries) != len(token_ids):
        got = "none" if entries is None else len(entries)
        raise ValueError(
            f"{where}: prompt_logprobs must have an entry for each of the {len(token_ids)} tokens, "
            f"got {got}; was the sequence cut, or a token added, on the server?"
        )
    if not 1 <= length < len(token_ids):
        raise ValueError(
            f"{where}: completion_lengths must lie in [1, {len(token_ids) - 1}] (the first token "
            f"has no score), got {length}"
        )
    if entries[0]:  # vLLM's flat_logprobs has an empty one
        raise ValueError(
            f"{where}: the first entry must be None (nothing predicts the first token), got "
            f"{type(entries[0]).__name__}; do the entries begin one token late?"
        )
    found = []
    for position in range(len(token_ids) - length, len(token_ids)):
        here, token = f"{where}, position {position}", int(token_ids[position])
        scores = _read_entry(here, entries[position])
        if token not in scores:
            raise ValueError(
                f"{here}: must score token {token}, got scores of "
                f"{', '.join(map(str, list(scores)[:5]))}; are the tokens those that were sent?"
            )
        best: list[tuple[int, float]] = []
        if topk is not None:
            best = sorted(scores.items(), key=lambda pair: -pair[1])[:topk]
            if len(best) < topk:
                raise ValueError(
                    f"{here}: must score topk = {topk} tokens, got {len(best)}; "
                    f"ask the server for prompt_logprobs={topk}"
                )
        found.append((scores[token], best))
    return found


def _read_entry(where: str, entry: Any) -> dict[int, float]:
    """``{token id: log-prob}`` of one position."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where}: must be a mapping of token ids, got {type(entry).__name__}")
    scores: dict[int, float] = {}
    for key, value in entry.items():
        try:
            token = int(key)
            score = value["logprob"] if isinstance(value, Mapping) else getattr(value, "logprob", value)
            score = float(score)
        except (KeyError, TypeError, ValueError):
            raise TypeError(
                f"{where}: must map a token id to an object or mapping with logprob, got {key!r}: {value!r}"
            ) from None
        if token < 0 or token in scores:
            again = " twice" if token in scores else ""
            raise ValueError(f"{where}: must have distinct token ids >= 0, got {token}{again}")
        if not score <= ROUNDING:
            raise ValueError(f"{where}: token {token} must have a log-probability <= 0, got {score}")
        scores[token] = min(score, 0.0)
    mass = sum(math.exp(score) for score in scores.values())
    if mass > 1 + ROUNDING:
        raise ValueError(f"{where}: probabilities must sum to at most 1, got {mass:.3f}; are these log-probabilities?")
    return scores
