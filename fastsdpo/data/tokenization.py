"""Turns an interaction into token ids: student = x + y, teacher = (x with o) + y, the same y ids in both.

Here x is the prompt, y the answer and o the follow-up. The ids of ordinary text are those of the code published
with https://arxiv.org/abs/2603.12273:

    prompt_ids         = tokenize(chat_template(x, add_generation_prompt))
    teacher_prompt_ids = tokenize(chat_template(x with o, add_generation_prompt))
    completion_ids     = tokenize(y.rstrip()) + [end of turn]

where tokenize adds no special tokens (the template writes them), with these differences:

- Text cannot smuggle in control tokens. Where a message contains the spelling of one (a user pastes
  ``<|im_end|>``), that text is encoded as text. (`allow_special_tokens=True` lets it.)
- A limit on the prompt cuts the history that student and teacher share in the same place on both
  sides, in whole messages where it can, and never the hindsight text, the template's frame or the
  generation prompt. (`truncation="independent-left"`: each prompt by itself.)
- The answer ends with the token that ends the model's turns in its chat template, which for some
  models is not their ``eos_token``. (`end_of_turn="eos"`: with that.)
- Prompt and answer together are the ids of the conversation as the chat template renders it when the
  answer is there. What it writes between generation prompt and answer (a channel, an empty think block)
  belongs to the prompt; white space that it drops is dropped (not with `end_of_turn="eos"`); a space
  that the tokenizer would put before the answer is not. Both renderings are compared when the tokenizer
  is made, and a template for which this cannot be had is refused. An answer that the model itself wrote
  is taken as it was, after the generation prompt alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from fastsdpo.data.chat_template import ChatTemplate, Opening
from fastsdpo.data.control_tokens import ControlTokens
from fastsdpo.data.encoding import Encoder
from fastsdpo.data.interactions import Interaction
from fastsdpo.data.templates import HindsightTemplate
from fastsdpo.data.truncation import cut

LONG = 8  # characters for each token of the limit, from which on a prompt is looked at from its end
BATCH = 64  # interactions whose texts a fast tokenizer gets in one call


@dataclass(frozen=True)
class TokenizedInteraction:
    """Token ids: student = prompt + completion, teacher = teacher_prompt + completion.

    Attributes:
        prompt_ids: x as the chat template renders it, up to where the answer begins.
        teacher_prompt_ids: the same with the follow-up in the last user message.
        completion_ids: y and, unless y was cut, the tokens that end the turn.
        id, conversation_id: those of the interaction.
        neutral_prompt_ids: like teacher_prompt_ids, but with a neutral follow-up; None if the
            `InteractionTokenizer` has none.
    """

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]
    id: str | None = None
    conversation_id: str | None = None
    neutral_prompt_ids: list[int] | None = None


class InteractionTokenizer:
    """Tokenizes interactions for one tokenizer, template and set of limits.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template, or anything that has its
            ``__call__``, ``apply_chat_template``, ``convert_tokens_to_ids``,
            ``all_special_tokens``, ``eos_token`` and, for other added tokens,
            ``added_tokens_decoder``.
        template: how the follow-up enters the context; a text with ``{o}`` or a preset's name too.
        max_prompt_length: most tokens of the student's prompt. The teacher's prompt is the same
            history and the hindsight text. None: no limit.
        max_completion_length: most tokens of the completion, the rest is cut off on the right. A
            cut completion has no end-of-turn token, since the answer did not end there.
        max_followup_length: most tokens of the follow-up (its end is cut), with
            ``truncation="shared"``.
        truncation: ``"shared"`` drops the oldest messages, up to a user's, until the student's
            prompt fits; then the beginning of the last user message. The system message stays,
            unless it alone takes more than half the limit when only the last message is left.
            ``"independent-left"`` is the paper's: the last `max_prompt_length` tokens of each
            prompt, cut apart from each other.
        end_of_turn: ``"template"``: the token that follows an answer in the chat template, or
            ``eos_token`` where no token does; where nothing follows the last answer, the token
            that follows an earlier one. ``"eos"``: ``eos_token`` (the paper's). Else a token.
        chat_template_kwargs: for the chat template. ``enable_thinking=False`` is passed where the
            template knows the word, unless given here.
        chat_template_date: the date and time, in ISO form, that a chat template with a clock reads.
            None: now, and the same for all interactions.
        allow_special_tokens: let the spelling of a control token in a message be that token.
        neutral_followup: a follow-up that says nothing, with which the teacher's prompt is made once
            more.

    Raises:
        ValueError: no chat template, or one whose finished turns cannot be compared with its prompts
            (see `ChatTemplate`); no end-of-turn token, an unknown option or limit below 1.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: HindsightTemplate | str,
        *,
        max_prompt_length: int | None = 2048,
        max_completion_length: int | None = 2048,
        max_followup_length: int | None = 1024,
        truncation: Literal["shared", "independent-left"] = "shared",
        end_of_turn: str = "template",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_date: str | None = None,
        allow_special_tokens: bool = False,
        neutral_followup: str | None = None,
    ):
        limits = {
            "max_prompt_length": max_prompt_length,
            "max_completion_length": max_completion_length,
            "max_followup_length": max_followup_length,
        }
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"tokenize_interaction: {name} must be at least 1, got {limit}")
        if truncation not in ("shared", "independent-left"):
            raise ValueError(
                f"tokenize_interaction: truncation must be 'shared' or 'independent-left', got {truncation!r}"
            )
        chat_template = getattr(tokenizer, "chat_template", "")
        if not chat_template and hasattr(tokenizer, "chat_template"):
            raise ValueError(
                "tokenize_interaction: tokenizer must have a chat template, got none; use an "
                "instruction-tuned model's tokenizer or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer
        self.template = HindsightTemplate.parse(template) if isinstance(template, str) else template
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.max_followup_length = max_followup_length
        self.truncation = truncation
        self.allow_special_tokens = allow_special_tokens
        self.neutral_followup = neutral_followup
        date = None
        if chat_template_date is not None:
            try:
                date = datetime.fromisoformat(chat_template_date)
            except (TypeError, ValueError):
                raise ValueError(
                    "tokenize_interaction: chat_template_date must be a date like 2026-01-31, "
                    f"got {chat_template_date!r}"
                ) from None
        self.chat = ChatTemplate(tokenizer, chat_template_kwargs, date)
        self._as_rendered = end_of_turn != "eos"
        self._control = ControlTokens(tokenizer, self.chat, end_of_turn)
        self.end_of_turn, self.end_of_turn_id = self._control.end, self._control.end_ids[-1]
        self._encoder = Encoder(tokenizer, self.chat, self._control, allow_special_tokens)

    def __call__(self, interaction: Interaction, completion_ids: Sequence[int] | None = None) -> TokenizedInteraction:
        """Tokenizes one interaction.

        Args:
            completion_ids: of an answer that the model wrote after `generation_prompt`; it is taken as
                it is, in the place of the interaction's text.

        Raises:
            ValueError: the chat template refuses the messages, the follow-up is blank, or not even
                the end of the last message fits; the text names the interaction.
        """
        (result,) = self._run([interaction], completion_ids)
        if isinstance(result, ValueError):
            raise result
        return result

    def generation_prompt(self, messages: list[dict]) -> list[int]:
        """Returns the ids of a prompt that the model is to answer; its last message is a user's.

        Raises:
            ValueError: the messages cannot be tokenized; the text says why.
        """
        return self(Interaction(messages, "", "-"), ()).prompt_ids

    def end_ids(self, model: Any) -> list[int]:
        """Returns the ids of all tokens that end an answer of a model.

        These are the token with which the chat template ends turns, ``eos_token``, and all that the model's own
        generation config names.
        """
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = own if isinstance(own, (list, tuple)) else [own]
        ids = [self.end_of_turn_id, getattr(self.tokenizer, "eos_token_id", None), *own]
        return list(dict.fromkeys(token for token in ids if token is not None))

    def said(self, completion_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """Returns the text by which an answer of the model speaks to the reader.

        If the tokenizer has a ``response_template``, the text is the content of the message that it parses.
        Else it is the answer without control tokens and without private reasoning (think blocks, and channels
        other than the one in which the chat template writes finished answers). It is empty if the answer was
        cut before it came to that.

        Args:
            completion_ids: the answer.
            prompt_ids: the prompt of the answer, which may open a block of reasoning.
        """
        ids = list(completion_ids)
        if getattr(self.tokenizer, "response_template", None):
            message = self.tokenizer.parse_response(ids, prefix=list(prompt_ids)) if ids else {}
            content = message.get("content")
            return content.strip() if isinstance(content, str) else ""
        channel = self._encoder.channel
        if channel:
            starts = [i for i, token in enumerate(ids) if token == channel[0]]
            found = [i for i in starts if ids[i : i + len(channel)] == channel]
            if found:
                ids = ids[found[-1] + len(channel) :]
                ends = [i for i, token in enumerate(ids) if token in self._control.ids]
                ids = ids[: ends[0]] if ends else ids
            elif starts:
                return ""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        ids = [token for token in ids if token not in self._control.ids and token != unknown]
        return self.chat.said(self.tokenizer.decode(ids))

    def stream(self, interactions: Iterable[Interaction]) -> Iterator[TokenizedInteraction | ValueError]:
        """Tokenizes interactions in order. For one that cannot be tokenized it yields the error instead.

        A fast tokenizer gets the texts of 64 interactions at once and encodes them in as many
        threads as it likes (``TOKENIZERS_PARALLELISM=false``: one). The ids are the same.
        """
        interactions = iter(interactions)
        while batch := list(itertools.islice(interactions, BATCH)):
            yield from self._run(batch)

    def _run(
        self, batch: list[Interaction], completion_ids: Sequence[int] | None = None
    ) -> list[TokenizedInteraction | ValueError]:
        steps = [self._steps(interaction, completion_ids) for interaction in batch]
        results: dict[int, TokenizedInteraction | ValueError] = {}
        while len(results) < len(batch):
            texts: list[str] = []
            for index, interaction in enumerate(batch):
                if index in results:
                    continue
                try:
                    texts += next(steps[index])
                except StopIteration as end:
                    results[index] = end.value
                except (TypeError, ValueError) as error:
                    name = "" if interaction.id is None else f"interaction {interaction.id!r}: "
                    failure = ValueError(f"tokenize_interaction: {name}{error}")
                    failure.__cause__ = error
                    results[index] = failure
            if len(batch) > 1:
                self._encoder.encode_ahead(texts)
        self._encoder.encode_ahead([])
        return [results[index] for index in range(len(batch))]

    def _steps(
        self, interaction: Interaction, given: Sequence[int] | None
    ) -> Generator[list[str], None, TokenizedInteraction]:
        """Tokenizes one interaction, in steps; yields the texts that the next step will encode."""
        whole_messages = self.truncation == "shared"
        prompt, opening, completion = interaction.prompt, self.chat.generation, ""
        if given is None:
            opening, completion = self.chat.finish(prompt, interaction.completion.rstrip(), trim=self._as_rendered)
            if self._as_rendered and self._encoder.swallows:
                completion = completion.lstrip()
        if whole_messages:
            prompt = self._recent(prompt, opening)
        rendered = self._encoder.render(prompt, opening)
        first = interaction.followup.strip()[: self.max_followup_length]  # of which `_cut` starts
        answer = self._encoder.answer_anchor + completion
        yield [rendered, answer, first] if whole_messages else [rendered, answer]

        if whole_messages:
            prompt, prompt_ids = self._fit(prompt, rendered, opening)
        else:
            prompt_ids = self._cut_left(self._encoder.encode_prompt(prompt, opening, rendered))
        if given is None:
            completion_ids = self._encoder.encode_answer(completion)[: self.max_completion_length]
        else:
            completion_ids = list(given)
        followups = [interaction.followup]
        if self.neutral_followup is not None:
            followups.append(self.neutral_followup)
        prompts = [self._teacher_prompt(prompt, followup) for followup in followups]
        texts = [self._encoder.render(messages, opening) for messages in prompts]
        yield texts

        teachers = [self._encoder.encode_prompt(messages, opening, text) for messages, text in zip(prompts, texts)]
        if not whole_messages:
            teachers = [self._cut_left(ids) for ids in teachers]
        return TokenizedInteraction(
            prompt_ids=prompt_ids,
            teacher_prompt_ids=teachers[0],
            completion_ids=completion_ids,
            id=interaction.id,
            conversation_id=interaction.conversation_id,
            neutral_prompt_ids=teachers[1] if len(teachers) > 1 else None,
        )

    # Length limits

    def _cut_left(self, ids: list[int]) -> list[int]:
        return ids if self.max_prompt_length is None else ids[-self.max_prompt_length :]

    def _teacher_prompt(self, prompt: list[dict], followup: str) -> list[dict]:
        if self.truncation == "shared":
            followup = cut(followup.strip(), self._encoder.encode_text, self.max_followup_length, keep="start")
        return self.template.apply(prompt, followup)

    def _recent(self, prompt: list[dict], opening: Opening) -> list[dict]:
        """Of a prompt much longer than the limit, the end, in which everything is that fits: so that the work
        on one of a thousand messages is that on those which fit."""
        limit = self.max_prompt_length
        if limit is None or sum(len(message["content"]) for message in prompt) <= LONG * limit:
            return prompt
        system = [message for message in prompt[:1] if message["role"] == "system"]
        starts = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        for count in itertools.takewhile(lambda count: count < len(starts), (1 << i for i in itertools.count())):
            kept = system + prompt[starts[-count] :]
            if len(self._encoder.encode_prompt(kept, opening)) > limit:
                return kept
        return prompt

    def _fit(self, prompt: list[dict], rendered: str, opening: Opening) -> tuple[list[dict], list[int]]:
        """(messages, ids): as much of the end of the prompt as the limit holds."""
        limit = self.max_prompt_length
        ids = self._encoder.encode_prompt(prompt, opening, rendered)
        if limit is None or len(ids) <= limit:
            return prompt, ids
        system = [message for message in prompt[:1] if message["role"] == "system"]
        starts = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        # The first start from which the rest fits; lengths fall with the start, so by bisection.
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            if len(self._encoder.encode_prompt(system + prompt[starts[middle] :], opening)) <= limit:
                high = middle
            else:
                low = middle + 1
        kept = system + prompt[starts[low] :]
        ids = self._encoder.encode_prompt(kept, opening)
        if len(ids) <= limit:
            return kept, ids
        if system and len(self._encoder.encode_text(system[0]["content"])) > limit // 2:
            system = []
        last = prompt[-1]

        def encode(text: str) -> list[int]:
            return self._encoder.encode_prompt([*system, {**last, "content": text}], opening)

        content = cut(last["content"], encode, limit, keep="end")
        if not content:
            raise ValueError(
                f"max_prompt_length={limit} cannot hold the chat template's own "
                f"{len(encode('.')) - 1} tokens and any of the last message"
            )
        return [*system, {**last, "content": content}], encode(content)


def tokenize_interaction(
    tokenizer: Any, interaction: Interaction, template: HindsightTemplate | str, **options: Any
) -> TokenizedInteraction:
    """Turns an interaction into the token ids that student and teacher read.

    To tokenize many, make one `InteractionTokenizer`, or call `tokenize_interactions`.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        template: how the teacher sees the follow-up; a text with ``{o}`` or a preset's name.
        options: those of `InteractionTokenizer`, such as ``max_prompt_length``.

    Raises:
        ValueError: the tokenizer, an option or the interaction cannot be used; the text says why.
    """
    return InteractionTokenizer(tokenizer, template, **options)(interaction)


def tokenize_interactions(
    tokenizer: Any,
    interactions: Iterable[Interaction],
    template: HindsightTemplate | str,
    *,
    errors: list[str] | None = None,
    **options: Any,
) -> Iterator[TokenizedInteraction]:
    """Tokenizes interactions one after the other, as they are asked for.

    Args:
        tokenizer, template, options: as `tokenize_interaction`.
        interactions: in any number; they are read once.
        errors: a list, to which the error messages of interactions that cannot be tokenized are appended;
            these interactions are left out. None: the first error is raised.

    Raises:
        ValueError: as `tokenize_interaction`.
    """
    for result in InteractionTokenizer(tokenizer, template, **options).stream(interactions):
        if isinstance(result, TokenizedInteraction):
            yield result
        elif errors is None:
            raise result
        else:
            errors.append(str(result))
