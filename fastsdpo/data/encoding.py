"""Encodes messages and answers as token ids, so that control tokens come from the chat template alone.

A conversation's prompts repeat one another, so text is encoded in pieces, each of which begins with a control
token, and a piece that was encoded before is not encoded again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

from fastsdpo.data.chat_template import ANSWER, ChatTemplate, Opening, Q
from fastsdpo.data.control_tokens import ControlTokens, alternatives

KEPT_CHARACTERS = 1 << 21  # of pieces whose ids are kept; twice as many at most


class Encoder:
    """Encodes what a chat template writes, and the texts of messages inside it.

    Args:
        allow_special_tokens: let the spelling of a control token in a message be that token.

    Attributes:
        answer_anchor: a text put before an answer while it is encoded, so that the tokenizer adds no space; its
            ids are taken off again.
        swallows: the token before an answer takes the white space after it, the answer's own too.
        channel: ids of the markup between generation prompt and answer, without reasoning.

    Raises:
        ValueError: the tokenizer does not encode a prompt and an answer as it encodes the whole turn.
    """

    def __init__(self, tokenizer: Any, chat: ChatTemplate, control: ControlTokens, allow_special_tokens: bool):
        self.tokenizer, self.chat, self.control = tokenizer, chat, control
        self.allow_special_tokens = allow_special_tokens
        self._recent: dict[str, list[int]] = {}  # pieces and their ids
        self._older: dict[str, list[int]] = {}
        self._size = 0
        # Where a piece begins; a token that takes the space before it stays in the piece with that space.
        self._starts = re.compile("(?!)")
        if getattr(tokenizer, "is_fast", False):
            self._starts = alternatives(control.texts - control.strips_left)
        for frame in chat.frames:
            apart = itertools.chain.from_iterable(map(self._encode_whole, self._pieces(frame)))
            if self._encode_whole(frame) != list(apart):
                self._starts = re.compile("(?!)")
        self._align()

    def _align(self) -> None:
        """Compares the ids of the pieces with those of a whole turn, and finds how to get them.

        Some tokenizers put a space (``▁``) before any text. What stands inside a rendered conversation
        must not get one, so it is encoded behind an anchor, whose ids are then taken away.
        """
        control, newline = self.control, "\n"
        apart = self.encode(ANSWER)
        behind_control, behind_text = self.encode(control.end + ANSWER), self.encode(newline + ANSWER)
        self._anchor_ids = self.encode(newline)
        self._text_anchor = "" if behind_text == self._anchor_ids + apart else newline
        self._control_anchor = "" if behind_control == self.encode(control.end) + apart else newline

        chat, prompt = self.chat, self.chat.frames[0]
        turn = chat.answer(prompt) + ANSWER
        written = turn + (control.ending if chat.finished.startswith(turn + control.ending) else "")
        whole = self.encode(written)
        while True:
            opening = chat.answer(prompt)
            ends = [m.end() for m in control.spelling.finditer(opening)]
            after_control = bool(ends) and ends[-1] == len(opening)
            self.answer_anchor = self._control_anchor if after_control else self._text_anchor
            pieces = self.encode(opening) + self.encode_answer(chat.finish([Q], ANSWER)[1])
            left = pieces[len(whole) :]  # what ends the turn, where the template does not write it
            if pieces[: len(whole)] == whole and left in ([], control.end_ids):
                break
            if not chat.move_space():
                tokens = getattr(self.tokenizer, "convert_ids_to_tokens", list)
                raise ValueError(
                    f"tokenize_interaction: the tokenizer of {chat.name} must encode a prompt and an "
                    f"answer to the same tokens as the whole turn {written[-120:]!r}, got "
                    f"{tokens(pieces[-12:])} for {tokens(whole[-12:])}; set tokenizer.chat_template to "
                    "one that puts a token of its own before answers"
                )
        headers = [m for m in control.spelling.finditer(opening) if not opening[m.end() :].strip()]
        self.swallows = bool(headers) and headers[-1].group() in control.strips_right
        # The markup between generation prompt and answer, where it is more than reasoning left out.
        between = chat.answer.add if chat.generation == Opening() else ""
        found = control.spelling.search(between)
        self.channel = self.encode(between[found.start() :].rstrip()) if found else []

    def render(self, messages: list[dict], opening: Opening) -> str:
        return opening(self.chat.render(messages))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of text. A control token that is spelled out in it becomes that token."""
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._known(piece) or self._keep(piece, self._encode_whole(piece))
        return ids

    def encode_ahead(self, texts: list[str]) -> None:
        """Encodes texts in one call and keeps their ids, if that is faster than one call each."""
        if not getattr(self.tokenizer, "is_fast", False):
            return
        pieces = dict.fromkeys(piece for text in texts for piece in self._pieces(text))
        new = [piece for piece in pieces if self._known(piece) is None]
        if not new:
            return
        try:
            ids = self.tokenizer(new, add_special_tokens=False)["input_ids"]
        except (TypeError, ValueError):
            return  # one of them (half a surrogate pair): it fails again by itself, and alone
        for piece, piece_ids in zip(new, ids, strict=True):
            self._keep(piece, piece_ids)

    def _encode_whole(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pieces(self, text: str) -> list[str]:
        places = [match.start() for match in self._starts.finditer(text)]
        edges = [0, *(place for place in places if place), len(text)]
        return [text[start:end] for start, end in itertools.pairwise(edges)] if text else []

    def _known(self, piece: str) -> list[int] | None:
        ids = self._recent.get(piece)
        if ids is None and (ids := self._older.get(piece)) is not None:
            self._keep(piece, ids)
        return ids

    def _keep(self, piece: str, ids: list[int]) -> list[int]:
        if self._size > KEPT_CHARACTERS:
            self._older, self._recent, self._size = self._recent, {}, 0
        self._recent[piece] = ids
        self._size += len(piece)
        return ids

    def _smuggles(self, ids: list[int], wanted: int) -> bool:
        return sum(map(self.control.ids.__contains__, ids)) > wanted

    def _encode_inside(self, text: str, anchor: str, **options: Any) -> list[int]:
        """The ids of text that does not begin what is encoded; see `_align`."""
        if not options:
            ids = self.encode(anchor + text)
        else:
            ids = list(self.tokenizer(anchor + text, add_special_tokens=False, **options)["input_ids"])
        if not anchor:
            return ids
        count = len(self._anchor_ids)
        if ids[:count] != self._anchor_ids:
            raise ValueError(f"the tokenizer encodes {text[:40]!r} in one token with what is before it")
        return ids[count:]

    def encode_answer(self, text: str) -> list[int]:
        if not text:
            return list(self.control.end_ids)
        return self.encode_text(text + self.control.end_space, self.answer_anchor) + self.control.end_ids

    def encode_text(self, text: str, anchor: str = "") -> list[int]:
        """Returns the ids of text that comes from data; no control token is among them."""
        if not text:
            return []
        ids = self._encode_inside(text, anchor)
        if self.allow_special_tokens or not (self.control.spelling.search(text) or self._smuggles(ids, 0)):
            return ids
        ids = self._encode_inside(text, anchor, split_special_tokens=True)
        if self._smuggles(ids, 0):
            # An added token that is not marked special is matched all the same: break its spelling
            # after the first character and encode what lies between the breaks.
            breaks = [match.start() + 1 for match in self.control.spelling.finditer(text)]
            edges = [0, *breaks, len(text)]
            ids = []
            for start, end in itertools.pairwise(edges):
                ids += self._encode_inside(text[start:end], self._text_anchor if start else anchor)
        if self._smuggles(ids, 0):
            raise ValueError(
                "the text contains the spelling of a control token that this tokenizer cannot encode as text"
            )
        return ids

    def encode_prompt(self, messages: list[dict], opening: Opening, rendered: str | None = None) -> list[int]:
        """Returns the ids of the messages; control tokens are only where the template puts them.

        Args:
            opening: the opening of the answer, which ends the prompt.
            rendered: the messages as the template renders them; None: they are rendered here.
        """
        contents = [message["content"] for message in messages]
        rendered = self.render(messages, opening) if rendered is None else rendered
        if self.allow_special_tokens:
            return self.encode(rendered)
        if not any(self.control.spelling.search(content) for content in contents):
            ids = self.encode(rendered)
            # More control tokens than spelled out: a normalizer made one out of other characters.
            if self._smuggles(ids, len(self.control.spelling.findall(rendered))):
                ids = self._encode_around(rendered, lambda segment: True, lambda segment: segment)
            return ids

        # Every control spelling in a message gets a stand-in, a word that occurs nowhere, so that
        # what the template itself writes can be told from what the messages contain.
        word = "sdpostandin"
        while any(word in content for content in contents):
            word += "x"
        spellings: list[str] = []

        def stand_in(match: re.Match) -> str:
            spellings.append(match.group())
            return f"{word}{len(spellings) - 1}z"

        marked = [
            {**message, "content": self.control.spelling.sub(stand_in, message["content"])} for message in messages
        ]

        def restore(segment: str) -> str:
            return re.sub(word + "([0-9]+)z", lambda m: spellings[int(m.group(1))], segment)

        return self._encode_around(self.render(marked, opening), lambda segment: word in segment, restore)

    def _encode_around(
        self, rendered: str, is_data: Callable[[str], bool], restore: Callable[[str], str]
    ) -> list[int]:
        """Encodes the template's control tokens as such, the text between them that `is_data` (its
        stand-ins replaced by `restore`) as text, and the rest as it is.
        """
        ids: list[int] = []
        done = 0  # everything before is encoded
        controls = list(self.control.spelling.finditer(rendered))
        starts = [0] + [match.end() for match in controls]
        ends = [match.start() for match in controls] + [len(rendered)]
        for index, (start, end) in enumerate(zip(starts, ends)):
            segment = rendered[start:end]
            if not is_data(segment):
                continue
            if done < start:
                ids += self.encode(rendered[done:start])
            if index > 0 and controls[index - 1].group() in self.control.strips_right:
                segment = segment.lstrip()
            if index < len(controls) and controls[index].group() in self.control.strips_left:
                segment = segment.rstrip()
            ids += self.encode_text(restore(segment), self._control_anchor if index else "")
            done = end
        if done < len(rendered):
            ids += self.encode(rendered[done:])
        return ids
