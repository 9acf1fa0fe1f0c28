"""Finds the tokens with which a chat template frames messages, and those that end a turn; no text may become them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fastsdpo.data.chat_template import QUESTION, REASONING_TAGS, ChatTemplate, shared


class ControlTokens:
    """The control tokens of a tokenizer with its chat template.

    They are the tokenizer's special tokens and every added token with which the chat template frames
    messages. Other added tokens (white space, the tags of reasoning) are text that happens to have an id
    of its own, as in the published code.

    Args:
        end_of_turn: as for `InteractionTokenizer`.

    Attributes:
        texts: the texts of all control tokens.
        spelling: a pattern that matches any of these texts.
        ids: the ids of all control tokens.
        end: the text of the token that ends the model's turns.
        end_ids: the ids of all tokens at the end of an answer; the last is that of `end`.
        end_space: the white space before these tokens.
        ending: that white space and these tokens, as text.
        strips_left, strips_right: the control tokens that swallow the white space on that side.

    Raises:
        ValueError: no end of a turn is known, it is not a token, or the template writes it before an answer too.
    """

    def __init__(self, tokenizer: Any, chat: ChatTemplate, end_of_turn: str):
        added = {
            str(getattr(token, "content", token)): token
            for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        }
        special = {text for text, token in added.items() if getattr(token, "special", True)}
        special.update(str(text) for text in tokenizer.all_special_tokens)
        special -= REASONING_TAGS
        text = {token for token in added if token.isspace()} | REASONING_TAGS
        every = alternatives(special | (added.keys() - text))

        ends = [end_of_turn]
        self.end_space = ""
        if end_of_turn == "template":
            self.end_space, ends = _find_end(chat, every, tokenizer.eos_token)
        if not ends or end_of_turn == "eos":
            if tokenizer.eos_token is None:
                raise ValueError(
                    "tokenize_interaction: tokenizer must have an eos_token, since its chat "
                    "template ends answers with no token; or pass end_of_turn='<token>'"
                )
            ends = [tokenizer.eos_token]
        self.end_ids: list[int] = []
        for end in ends:
            token_id = tokenizer.convert_tokens_to_ids(end)
            if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
                raise ValueError(f"tokenize_interaction: end_of_turn must be one token of the tokenizer, got {end!r}")
            self.end_ids.append(token_id)
        self.end: str = ends[-1]
        if end_of_turn == "template" and chat.answer != chat.generation and self.end in chat.answer.add:
            raise ValueError(
                f"tokenize_interaction: the chat template of {chat.name} must write {self.end!r}, which ends an "
                f"answer, after it alone, got {chat.answer.add!r} before it, where a model that reasons would stop; "
                'pass chat_template_kwargs with which it does not (such as {"thinking": false}), or end_of_turn'
            )
        self.ending: str = self.end_space + "".join(ends)

        frames = [match for frame in chat.frames for match in every.findall(frame)]
        control = special | set(frames) | set(ends)
        self.texts = control
        self.spelling = alternatives(control)
        # Text without a token of its own becomes <unk>: that id alone shows no control token.
        control_ids = {tokenizer.convert_tokens_to_ids(text) for text in control}
        self.ids = control_ids - {getattr(tokenizer, "unk_token_id", None)}
        # A token that takes the white space next to it; encoding around it has to do so too.
        self.strips_left = {t for t in control if getattr(added.get(t), "lstrip", False)}
        self.strips_right = {t for t in control if getattr(added.get(t), "rstrip", False)}


def _find_end(chat: ChatTemplate, every: re.Pattern, eos: str | None) -> tuple[str, list[str]]:
    """``(white space, tokens)`` that end the model's turns in the chat template.

    They are what follows an answer both in the last turn and in an earlier one, up to `eos`. Where these
    have nothing in common, they are the last turn's; and where that has none (the model then writes
    the token that begins the next turn), the earlier one's. A template that always asks for an answer
    writes a header after the last turn too, whose first tokens may be those of a user's header.
    """

    def run(text: str) -> tuple[str, list[str]]:
        rest = text.lstrip()
        space, found = text[: len(text) - len(rest)], []
        while match := every.match(rest):
            found.append(match.group())
            rest = rest[match.end() :]
        return space, found

    (space, last), (space_before, earlier) = run(chat.tail), run(chat.tail_before)
    both = last[: shared(last, earlier)]
    if eos in both:
        both = both[: both.index(eos) + 1]
    elif chat.asks_always and both:
        found, asked = every.findall(chat.tail_before), every.findall(chat.finished.partition(QUESTION)[0])
        both = both[: len(found) - shared(found[::-1], asked[::-1])] or both[:1]
    if both:
        return (space if space == space_before else ""), both
    return (space, last[:1]) if last else (space_before if earlier else "", earlier[:1])


def alternatives(texts: Iterable[str]) -> re.Pattern:
    """Returns a pattern that matches any of the texts, the longest first; without texts it matches nothing."""
    ordered = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered)) if ordered else "(?!)")
