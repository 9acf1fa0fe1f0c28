"""Checks whether an answer still speaks of its question, which the user's satisfaction alone does not show.

A user who wants short answers is satisfied by "This is a good question.", and perplexity does not reveal it.
The checks here count words. They do not tell a true answer from a false one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from fastsdpo.ops.token_logps import token_logps

# Words that say nothing of a topic, of four letters and more.
COMMON = frozenset(
    re.findall(
        r"\w+",
        "about also been being could does from give have help into just like make more need only please should some "
        "tell than that their them then there these they this those used using very want were what when where which "
        "will with would your",
    )
)
STEM = 5  # letters by which words are the same: "answer" and "answers"
_WORD = re.compile(r"[^\W\d_][\w+#-]{3,}")
_REFUSAL = re.compile(
    r"\bas an? (?:ai|language model)\b|\bi(?:'|’| a)m an ai\b|\bi(?:'|’| a)m (?:so )?(?:sorry|unable|not able)\b"
    r"|\bi apologi[sz]e\b|\bi (?:can(?:no|')t|can not) (?:help|assist|provide|answer)\b|\bsmollm\b",
    re.IGNORECASE,
)


class Content(NamedTuple):
    """What one answer says.

    Attributes:
        recall: share of the question's keywords that the answer holds; None where the question has none.
        new: how many keywords of the answer are not in the question.
        empty: whether there is no new keyword, so that the answer restates the question or says nothing.
        refuses: whether the answer refuses, apologizes or speaks of itself as a model.
    """

    recall: float | None
    new: int
    empty: bool
    refuses: bool


def keywords(text: str) -> set[str]:
    """Returns the beginnings of the words of four or more letters, without the common words in `COMMON`."""
    return {word[:STEM] for word in _WORD.findall(text.lower()) if word not in COMMON}


def content(question: str, answer: str) -> Content:
    """Counts the keywords that an answer shares with its question and those that it adds."""
    asked, said = keywords(question), keywords(answer)
    recall = len(asked & said) / len(asked) if asked else None
    new = len(said - asked)
    return Content(recall, new, new == 0, _REFUSAL.search(answer) is not None)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, conversations: list[list[dict]], *, max_tokens: int = 192) -> float:
    """Perplexity of conversations in their chat template: exp of the mean negative log-probability per token.

    Args:
        model: a causal LM of transformers.
        conversations: lists of messages with ``role`` and ``content``.
        max_tokens: how many tokens of each conversation count, from its beginning.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :max_tokens]
        ids = ids.to(model.get_input_embeddings().weight.device)
        logps: Any = token_logps(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        total, count = total - float(logps.double().sum()), count + logps.numel()
    model.train(training)
    return float(torch.tensor(total / count).exp())
