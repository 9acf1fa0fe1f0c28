"""Finds what a chat template writes around an answer, by rendering a short conversation.

Templates are programs, and no two families write an answer's turn alike. Between the generation prompt
and the answer some put a channel or an empty ``<think>`` block, some leave a block open for the model to
fill, some know no generation prompt at all, some take lists of parts where others take text. So this module
assumes nothing. It renders the turn of a finished answer once and compares it with the generation prompt,

    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nsdpoanswer<|im_end|>\\n
    `------------ opening -----------------------'          `--- tail ---'

and refuses a template whose parts it cannot tell apart.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

QUESTION, ANSWER, NEXT = "sdpoquestion", "sdpoanswer", "sdponextquestion"
Q, A, N = (
    {"role": role, "content": text} for role, text in (("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))
)

# What stands around private reasoning, by model family. These are part of what a model writes, so
# they are text that may have an id of its own, not tokens that frame messages.
REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
REASONING_TAGS = frozenset(tag for pair in REASONING for tag in pair) | {"<|channel>"}


class Opening(NamedTuple):
    """The text before an answer, as a change of the generation prompt: `cut` is taken off its end, `add` appended."""

    cut: str = ""
    add: str = ""

    def __call__(self, prompt: str) -> str:
        if self.cut and self.add and not prompt.endswith(self.cut):
            raise ValueError(
                f"the chat template ends this prompt in another way than others: it must end with "
                f"{self.cut!r}, got {_end(prompt)!r}"
            )
        return prompt.removesuffix(self.cut) + self.add


class ChatTemplate:
    """A tokenizer's chat template, and the parts of the turns that it writes.

    Args:
        tokenizer: has ``apply_chat_template``.
        options: keyword arguments for the template. ``enable_thinking=False`` is added if the template
            knows the word.
        date: the date and time for a template that asks for it; None: now, and the same from then on.

    Attributes:
        generation: opening of an answer that the model is to write.
        answer: opening of an answer that is already written.
        reasoned: opening of an answer whose text includes its own reasoning.
        finished: a finished turn as rendered text: ``QUESTION`` and ``ANSWER`` with the markup around them.
        tail, tail_before: the text that follows an answer in the last and in an earlier turn.
        asks_always: the generation prompt, if there is one, is written at the end of any conversation.
        frames: all rendered texts, in which to find the tokens with which the template frames messages.
        reasoning: those pairs of `REASONING` (opening and closing tag) that the model knows.

    Raises:
        ValueError: the template leaves out a text that it is given, or the turn of a finished answer
            does not begin like the generation prompt.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None = None, date: datetime.datetime | None = None
    ):
        self.tokenizer = tokenizer
        self._options = dict(options or {})
        source = _source(tokenizer, self._options)
        self._hint = "pass chat_template_kwargs with which both agree"
        if "enable_thinking" in source and "enable_thinking" not in self._options:
            self._options["enable_thinking"] = False
            self._hint += ' (such as {"enable_thinking": true})'
        if reads_clock(tokenizer, options):
            template = tokenizer.get_chat_template(self._options.get("chat_template"))
            self._options["chat_template"] = _at(date or datetime.datetime.now(), template)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        known = {str(getattr(token, "content", token)) for token in added}
        self.reasoning = [pair for pair in REASONING if pair[1] in source or pair[1] in known]

        self._parts = False
        prompt, self.finished = self._probe()
        before, _, self.tail = self.finished.partition(ANSWER)
        earlier = self.render([Q, A, N], add_generation_prompt=False)
        self.tail_before = earlier.partition(ANSWER)[2].partition(NEXT)[0]
        self.frames = [prompt, self.finished, earlier]
        self.asks_always = self.render([Q, A]) == self.finished
        self._find_openings(prompt, before)
        spaced = f"\n {ANSWER}"
        kept = self.render([Q, {**A, "content": spaced}], add_generation_prompt=False)
        self._trims = kept != self.finished.replace(ANSWER, spaced)
        self._lead = ""

    @property
    def name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)

    def render(self, messages: list[dict], *, add_generation_prompt: bool = True) -> str:
        """Renders the messages as text.

        Raises:
            ValueError: the template fails on the messages.
        """
        if self._parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
            )
        except Exception as error:  # templates raise what they like, jinja2's errors among them
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the chat template of {self.name} fails on the roles {roles}: {type(error).__name__}: {error}"
            ) from error

    def finish(self, prompt: list[dict], text: str, *, trim: bool = True) -> tuple[Opening, str]:
        """Returns the opening and the text of an answer, as the template writes it in a finished turn.

        An answer that brings its own reasoning gets no second, empty block before it. Where the
        template drops the reasoning of finished turns, the answer stays as it is.

        Args:
            prompt: the messages before the answer.
            text: the answer.
            trim: False leaves the text of an answer without reasoning as it is.

        Raises:
            ValueError: the template writes the turn of this answer unlike that of others.
        """
        opens, closing = next((p for p in self.reasoning if p[1] in text), ("", None))
        if closing is None and not (trim and self._trims and text[:1].isspace()):
            return self.answer, self._lead + text if text else text
        opening = self.answer if closing is None else self.reasoned
        rendered = self.render(prompt)
        before, lead = opening(rendered), ""
        turn = [*prompt, {"role": "assistant", "content": text}]
        whole = self.render(turn, add_generation_prompt=False)
        if closing is None and not whole.startswith(before):  # a block that only the generation prompt has
            before, lead = self._finished(rendered), self._lead
        written = None
        if whole.startswith(before) and whole.endswith(self.tail):
            written = lead + whole[len(before) : len(whole) - len(self.tail)]
        if closing is not None and written is not None:
            reason = text.partition(closing)[0].strip()
            kept = reason.removeprefix(opens).strip() in written
            if kept and 1 <= written.count(closing) <= text.count(closing):
                return opening, written
        elif written is not None and written.strip() == text.strip():
            return opening, written
        if closing is None:
            raise ValueError(
                f"the chat template of {self.name} writes this answer's turn in another way than "
                f"others: it must begin {_end(before)!r}, got {_around(whole, before)!r}"
            )
        return (self.reasoned if text.lstrip().startswith(opens) else self.generation), text

    def said(self, text: str) -> str:
        """Returns the part of an answer that is meant for the reader, without reasoning."""
        for opening, closing in self.reasoning:
            if closing in text:
                text = text.rpartition(closing)[2]
            elif self._leaves_open == opening or text.lstrip().startswith(opening):
                return ""  # cut in the middle of its reasoning
        return text.strip()

    def _probe(self) -> tuple[str, str]:
        """The generation prompt and a finished turn, with contents as text or as lists of parts."""
        problems = []
        for self._parts in (False, True):
            try:
                prompt, finished = (self.render([Q]), self.render([Q, A], add_generation_prompt=False))
            except ValueError as error:
                advice = "pass what it asks for as chat_template_kwargs, or set tokenizer.chat_template"
                problems.append(ValueError(f"tokenize_interaction: {error}; {advice}"))
                continue
            if QUESTION in prompt and ANSWER in finished.partition(QUESTION)[2]:
                return prompt, finished
            problems.append(
                ValueError(
                    f"tokenize_interaction: the chat template of {self.name} must write the text of "
                    f"messages, got {_end(prompt)!r} for the user's message {QUESTION!r}, and "
                    f"{_end(finished)!r} with the answer {ANSWER!r}; set tokenizer.chat_template to one "
                    "for text"
                )
            )
        raise problems[0]

    def _find_openings(self, prompt: str, before: str) -> None:
        """Compares the generation prompt with what stands before an answer in a finished turn."""
        tags = "|".join(
            rf"(?:{re.escape(opening)}\s*)?{re.escape(closing)}|{re.escape(opening)}"
            for opening, closing in self.reasoning
        )
        block = re.compile(rf"(?:{tags or '(?!)'})\s*$")
        extra = prompt[len(before) :] if prompt.startswith(before) else ""
        self._finished = _opening(prompt, before)
        header = _without_block(prompt, self.reasoning)
        self._leaves_open = next(
            (
                opening
                for opening, closing in self.reasoning
                if opening in prompt.rpartition(QUESTION)[2].rpartition(closing)[2]
            ),
            None,
        )

        self.generation = Opening()
        if before.startswith(prompt):
            self.answer = _opening(prompt, before)
            # A template that makes no difference between a prompt and a conversation: what it writes
            # before an answer is the only generation prompt that there is.
            same = self.render([Q], add_generation_prompt=False) == prompt
            if same and self.answer.add.strip():
                self.generation = self.answer
        elif header != prompt and (before.startswith(header) or before == header.rstrip()):
            # A closed block that only the generation prompt has stays; markup may stand in its place.
            self.answer = Opening("", block.sub("", before[len(header) :]))
        elif (extra and not extra.strip()) or (
            # Closed, or not there, in a finished turn without reasoning.
            self._leaves_open is not None and prompt.startswith(block.sub("", before))
        ):
            self.answer = _opening(prompt, before)
        else:
            raise ValueError(
                f"tokenize_interaction: the chat template of {self.name} must begin a finished answer "
                f"with its generation prompt, got the generation prompt {_around(prompt, before)!r} "
                f"and the finished turn {_around(before, prompt) + ANSWER!r}; {self._hint}, or set "
                "tokenizer.chat_template"
            )
        self.reasoned = _opening(prompt, block.sub("", before))

    def move_space(self) -> bool:
        """Moves the white space at the end of the answer's opening to the answer; returns False if there is none."""
        prompt, derived = self.frames[0], self.generation == self.answer != Opening()
        text = self.answer(prompt)
        bare = text.rstrip()
        self._lead = text[len(bare) :]
        self.answer = _opening(prompt, bare)
        if derived:
            self.generation = self.answer
        return bool(self._lead)


def shared(left: Sequence, right: Sequence) -> int:
    """Returns with how many equal items both sequences begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right)))


def reads_clock(tokenizer: Any, options: Mapping[str, Any] | None = None) -> bool:
    """Whether the chat template asks for the current date."""
    return "strftime_now" in _source(tokenizer, options or {})


def _source(tokenizer: Any, options: Mapping[str, Any]) -> str:
    return str(options.get("chat_template") or getattr(tokenizer, "chat_template", None) or "")


def _at(date: datetime.datetime, template: str) -> str:
    """The template, in which it always is that date.

    By a macro in the place of the function: templates are given plain data only, and this one's value
    must not depend on the clock. The last newline belongs to the tag before it (trim_blocks).
    """
    # All codes that this platform knows: it writes others as they are, or less its sign.
    written = {letter: date.strftime(f"%{letter}") for letter in string.ascii_letters}
    written = {letter: text for letter, text in written.items() if text not in (letter, f"%{letter}")}
    values = {f"%-{letter}": text.lstrip("0 ") or "0" for letter, text in written.items()}
    values |= {f"%{letter}": text for letter, text in written.items()}
    return (
        "{%- macro strftime_now(format) -%}{%- set at = namespace(text=format) -%}"
        f"{{%- for name, value in {json.dumps(values)}.items() -%}}"
        "{%- set at.text = at.text | replace(name, value) -%}{%- endfor -%}{{- at.text -}}"
        f"{{%- endmacro %}}\n{template}"
    )


def _without_block(prompt: str, reasoning: list[tuple[str, str]]) -> str:
    """The generation prompt without the closed block of reasoning, empty or not, at its end."""
    end = prompt.rstrip()
    for opening, closing in reasoning:
        if end.endswith(closing):
            start = end.rfind(opening)
            return end[: start if start > end.rfind(QUESTION) else -len(closing)]
    return prompt


def _opening(prompt: str, text: str) -> Opening:
    """The change that makes `text` of the prompt."""
    count = shared(prompt, text)
    return Opening(prompt[count:], text[count:])


def _end(text: str) -> str:
    return text if len(text) <= 80 else f"...{text[-80:]}"


def _around(text: str, other: str) -> str:
    """The text from a little before the first difference to the other one."""
    start = max(0, shared(text, other) - 40)
    return ("..." if start else "") + text[start : start + 200]
