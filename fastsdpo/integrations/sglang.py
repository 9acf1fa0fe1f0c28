"""A teacher behind SGLang: the scores of its ``/generate`` as teacher of `fastsdpo.sdpo_loss`.

The server gets the teacher's prompt followed by the response, and scores it:

    {"input_ids": [...], "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
     "return_logprob": true, "logprob_start_len": 0, "top_logprobs_num": K}

Its reply has, in ``meta_info``, an entry for every token from ``logprob_start_len`` on (the first without a score):

    "input_token_logprobs": [[null, id, text], [logprob, id, text], ...]
    "input_top_logprobs":   [null, [[logprob, id, text], ...], ...]          the K most likely tokens

https://docs.sglang.io/basic_usage/sampling_params.html; the text is null without ``return_text_in_logprobs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastsdpo.integrations.vllm import ServedTeacher, teacher_from_prompt_logprobs


def teacher_from_generate(
    replies: Sequence[Mapping[str, Any]],
    token_ids: Sequence[Sequence[int]],
    completion_lengths: Sequence[int],
    *,
    topk: int | None = None,
    device: torch.device | str | None = None,
) -> ServedTeacher:
    """Reads and checks the scores of several sequences.

    Args:
        replies: the JSON of ``/generate``, one per sequence (what `sglang.Engine.generate` returns too).
        token_ids: the sequences that were sent, teacher prompt and response.
        completion_lengths: how many of each sequence's last tokens are the response; >= 1.
        topk: also read the K most likely tokens of every position (``top_logprobs_num``).
        device: of the results.

    Returns:
        `ServedTeacher`, as of vLLM's scores.

    Raises:
        ValueError: numbers of sequences or tokens that differ, a reply without scores or with those of other tokens,
            a response that is scored in part, and whatever `teacher_from_prompt_logprobs` refuses.
        TypeError: an entry in another layout.
    """
    name = "teacher_from_generate"
    if len(replies) != len(token_ids):
        raise ValueError(
            f"{name}: replies and token_ids must have one entry per sequence, got {len(replies)} and {len(token_ids)}"
        )
    entries = [
        _entries(f"{name}: reply {i}", reply, ids, topk) for i, (reply, ids) in enumerate(zip(replies, token_ids))
    ]
    return teacher_from_prompt_logprobs(entries, token_ids, completion_lengths, topk=topk, device=device)


def _entries(
    where: str, reply: Mapping[str, Any], token_ids: Sequence[int], topk: int | None
) -> list[dict[int, float] | None]:
    """``{token id: log-prob}`` of every token that was sent, None where there is no score."""
    meta = reply.get("meta_info")
    if not isinstance(meta, Mapping):
        raise TypeError(f"{where}: must have a mapping meta_info, got {type(meta).__name__}")
    own, best = meta.get("input_token_logprobs"), meta.get("input_top_logprobs")
    if not own:
        raise ValueError(
            f"{where}: must have input_token_logprobs; ask for them with return_logprob, logprob_start_len=0"
        )
    if topk is not None and not best:
        raise ValueError(f"{where}: must have input_top_logprobs; ask for them with top_logprobs_num={topk}")
    read = meta.get("prompt_tokens", len(token_ids))
    if read != len(token_ids):
        raise ValueError(
            f"{where}: must have read the {len(token_ids)} tokens that were sent, got prompt_tokens = {read}; "
            "was the sequence cut on the server?"
        )
    lists = [own] if topk is None else [own, best]
    for scores in lists:
        if len(scores) != len(own) or len(scores) > len(token_ids):
            raise ValueError(
                f"{where}: must score at most the {len(token_ids)} tokens that were sent, and as many of them as it "
                f"lists the best of, got {len(own)} and {len(scores)}"
            )
    start = len(token_ids) - len(own)
    found: list[dict[int, float] | None] = [None] * start
    for position, scores in enumerate(zip(*lists), start=start):
        here = f"{where}, position {position}"
        logprob, token, _ = _triple(here, scores[0])
        if token != token_ids[position]:
            raise ValueError(
                f"{here}: must score token {token_ids[position]}, got {token}; are these the tokens sent?"
            )
        if logprob is None:
            found.append(None)
            continue
        tokens: dict[int, Any] = {}
        for entry in (scores[1] or []) if topk is not None else []:
            value, listed, _ = _triple(here, entry)
            if listed in tokens:
                raise ValueError(f"{here}: must list distinct tokens, got {listed} twice")
            tokens[listed] = value
        found.append({**tokens, token: logprob})
    return found


def _triple(where: str, entry: Any) -> tuple[Any, int, Any]:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
        raise TypeError(f"{where}: must be (log-prob, token id, text), got {entry!r}")
    return entry[0], int(entry[1]), entry[2]
