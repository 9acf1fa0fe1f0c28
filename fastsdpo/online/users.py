"""Users that react to the model's answers: by rule, by language model, by endpoint, or at the terminal.

A user is anything with ``feedback(prompts, responses) -> list[str]``. It may also have

    satisfied(prompts, responses) -> list[bool]    whether each answer is liked; the share is reported
    at(interactions)                               called before each batch with the number of answers
                                                   users were asked about so far, over all processes
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsdpo.data.interactions import is_blank
from fastsdpo.online.endpoint import ChatEndpoint
from fastsdpo.online.rules import Rule, parse_rule
from fastsdpo.online.terminal import MessageReader, interrupt

Messages = list[dict]


class UserSimulator(Protocol):
    """Reacts to answers. Any object with this method can be the user of `OnlineSDPOTrainer`."""

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        """Returns what the user says next.

        Args:
            prompts: N message lists; each ends with a user's message.
            responses: the model's N answers to them.

        Returns:
            N follow-ups; an empty text where the user says nothing, and nothing is then learned from that answer.
        """
        ...


def ask(user: Any, prompts: list[Messages], responses: list[str]) -> list[str | None]:
    """Asks the user for follow-ups, and checks them: one text (or None) per answer.

    Raises:
        TypeError, ValueError: the user returned something other than one text or None per answer.
    """
    followups = user.feedback(prompts, responses) if prompts else []
    if not isinstance(followups, Sequence) or isinstance(followups, str):
        raise TypeError(f"{type(user).__name__}.feedback must return a list of texts, got {type(followups).__name__}")
    if len(followups) != len(responses):
        raise ValueError(
            f"{type(user).__name__}.feedback must return {len(responses)} follow-ups, one per answer, "
            f"got {len(followups)}"
        )
    for index, text in enumerate(followups):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"{type(user).__name__}.feedback: [{index}] must be text or None, got {type(text).__name__}"
            )
    return list(followups)


class RuleUser:
    """A deterministic user with fixed wishes, who knows whether an answer fulfils them.

    Args:
        rules: `Rule` objects or texts like ``"max_words=20"`` (`fastsdpo.online.rules.RULES`).
        wish: what the user says if any rule is broken; None: the wishes of the broken rules.
        praise: what the user says if no rule is broken; None: nothing, so that the answer is not learned from.
    """

    def __init__(self, rules: Sequence[Rule | str], *, wish: str | None = None, praise: str | None = None):
        self.rules = [parse_rule(rule) if isinstance(rule, str) else rule for rule in rules]
        if not self.rules and not wish:
            raise ValueError("RuleUser: rules must not be empty (or wish must be given)")
        self.wish, self.praise = wish, praise

    @property
    def wishes(self) -> str:
        """All that the user wants, in the user's words."""
        return self.wish or " ".join(rule.wish for rule in self.rules)

    def satisfied(self, prompts: list[Messages], responses: list[str]) -> list[bool]:
        return [all(rule.holds(text) for rule in self.rules) for text in responses]

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        followups = []
        for text in responses:
            broken = [rule for rule in self.rules if not rule.holds(text)]
            if not broken and self.rules:
                followups.append(self.praise or "")
            else:
                followups.append(self.wish or " ".join(rule.wish for rule in broken))
        return followups


class ConstantUser:
    """A user who says the same whatever the answer is. As a control, the text is unrelated to the answer."""

    def __init__(self, text: str | Sequence[str]):
        self.texts = [text] if isinstance(text, str) else list(text)
        if not self.texts or not all(isinstance(t, str) and not is_blank(t) for t in self.texts):
            raise ValueError(f"ConstantUser: text must not be blank, got {text!r}")

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        return [self.texts[index % len(self.texts)] for index in range(len(responses))]


# Of a user who speaks of something else; nothing about an answer can be learned from them.
UNRELATED = (
    "My cat is called Minka.",
    "It rained here all day yesterday.",
    "I am going to the dentist tomorrow.",
    "My neighbour bought a red bicycle.",
)


class UnrelatedUser:
    """A control: whenever another user would say something, this one speaks of something else.

    Args:
        user: the other user, who decides which answers get a follow-up and reports satisfaction.
    """

    def __init__(self, user: Any):
        self.user = user

    @property
    def wishes(self) -> str:
        return self.user.wishes

    def satisfied(self, prompts: list[Messages], responses: list[str]) -> list[bool]:
        return self.user.satisfied(prompts, responses)

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        said = self.user.feedback(prompts, responses)
        return [UNRELATED[index % len(UNRELATED)] if text else "" for index, text in enumerate(said)]


class SwitchingUser:
    """A user whose preference changes: from given interactions on, another user reacts.

    Args:
        users: pairs ``(first interaction, user)``, ascending; the first pair starts at 0.
    """

    def __init__(self, users: Sequence[tuple[int, Any]]):
        starts = [start for start, _ in users]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"SwitchingUser: users must start at 0 and then ascend, got {starts}")
        self.users = list(users)
        self.current: Any = users[0][1]

    def at(self, interactions: int) -> None:
        for start, user in self.users:
            if interactions >= start:
                self.current = user
        if hasattr(self.current, "at"):
            self.current.at(interactions)

    @property
    def wishes(self) -> str:
        """The wishes of the current user."""
        return self.current.wishes

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        return self.current.feedback(prompts, responses)

    def __getattr__(self, name: str) -> Any:
        # Only a user of rules knows whether it is satisfied; one that is asked through an endpoint counts failures.
        if name not in ("satisfied", "failures"):
            raise AttributeError(name)
        return getattr(self.__dict__["current"], name)


PERSONA_SYSTEM = (
    "You play a user who talks to an assistant. This is who you are and what you want:\n{persona}\n\n"
    "You will see the conversation and the assistant's last answer. Write the user's next message, and "
    "nothing else: react to that answer as this user would, and say what should have been different."
)
PERSONA_TURN = "{history}\n\nassistant: {response}\n\nThe user's next message:"


class UserWording(NamedTuple):
    """How a language model is asked to play a user: a system prompt with {persona}, and the user's turn."""

    system: str = PERSONA_SYSTEM
    turn: str = PERSONA_TURN

    @classmethod
    def read(cls, path: str | None) -> UserWording:
        """Reads a wording from a file; the text before a line ``---`` is the system prompt. None: the default.

        Raises:
            OSError: the file cannot be read.
            ValueError: a placeholder for the persona, the conversation or the answer is missing.
        """
        if path is None:
            return cls()
        parts = re.split(r"(?m)^---\s*$", Path(path).read_text("utf-8-sig"), maxsplit=1)
        system, turn = parts if len(parts) == 2 else ("{persona}", parts[0])
        missing = [place for place in ("{history}", "{response}") if place not in turn]
        missing += [] if "{persona}" in system + turn else ["{persona}"]
        if missing:
            raise ValueError(f"{path}: must contain {' and '.join(missing)}")
        return cls(system.strip(), turn.strip())


def persona_messages(persona: str, prompt: Messages, response: str, wording: UserWording | None = None) -> Messages:
    """Builds the messages that ask a language model to play the user: persona, conversation and answer."""
    history = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    wording = wording or UserWording()
    places = {"persona": persona, "history": history, "response": response}

    def filled(text: str) -> str:
        return re.sub(r"\{(persona|history|response)\}", lambda found: places[found[1]], text)

    start = [{"role": "system", "content": filled(wording.system)}] if wording.system else []
    return [*start, {"role": "user", "content": filled(wording.turn)}]


class LocalChat:
    """Writes chat completions with a local model of transformers; the counterpart of `ChatEndpoint`.

    Args:
        model, tokenizer: a causal LM and its tokenizer, with a chat template.
        max_new_tokens: the most tokens of a reply.
        temperature: 0 takes the likeliest token. None follows the model's own generation config, or is
            0.7 if that config does not sample.
        batch_size: how many replies are written at once; None: all.
        seed: makes the draws of the n-th call of `replies` repeatable; None: torch's global generator draws.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 96,
        temperature: float | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ):
        from fastsdpo.data import InteractionTokenizer

        self.model, self.tokenizer = model, tokenizer
        self.tokenize = InteractionTokenizer(tokenizer, "note")
        self.end_ids = self.tokenize.end_ids(model)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.batch_size, self.seed = batch_size, seed
        self.calls = 0

    def replies(self, conversations: Sequence[Messages]) -> list[str | None]:
        """Returns one reply per conversation, in order; None if the model said nothing."""
        from fastsdpo.online.sampling import generate

        asked = [self.tokenize.generation_prompt(messages) for messages in conversations]
        samples = generate(
            self.model,
            asked,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            end_ids=self.end_ids,
            batch_size=self.batch_size,
            seed=None if self.seed is None else f"{self.seed}/{self.calls}",
        )
        self.calls += 1
        return [self.tokenize.said(sample.ids, prompt) or None for sample, prompt in zip(samples, asked)]


class EndpointUser:
    """A user played by a language model, whose system prompt says who the user is.

    A request that fails after its retries gives no follow-up: that interaction is left out, and
    ``failures`` counts it.

    Args:
        endpoint: the model to ask, a `ChatEndpoint` or a `LocalChat`.
        persona: who the user is and what they want.
        wording: how the model is asked; None: the default wording.
    """

    def __init__(self, endpoint: ChatEndpoint | LocalChat, persona: str, wording: UserWording | None = None):
        if is_blank(persona):
            raise ValueError("EndpointUser: persona must not be blank")
        self.endpoint, self.persona = endpoint, persona
        self.wording = wording or UserWording()

    @property
    def failures(self) -> dict[str, int]:
        """Requests without a follow-up, by kind of error."""
        return dict(getattr(self.endpoint, "failures", {}))

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        asked = [persona_messages(self.persona, p, r, self.wording) for p, r in zip(prompts, responses)]
        return [text or "" for text in self.endpoint.replies(asked)]


class LanguageModelUser(EndpointUser):
    """A user played by a local model of transformers. The arguments are those of `LocalChat` and `EndpointUser`."""

    def __init__(self, model: Any, tokenizer: Any, persona: str, **options: Any):
        super().__init__(LocalChat(model, tokenizer, **options), persona)


class TerminalUser:
    """A person at the terminal, who sees each answer and types what comes next. An empty line skips the answer.

    At a terminal the text is edited as in `fastsdpo chat`: Ctrl-C drops what was typed. Ctrl-C at an
    empty question, or the end of the input, asks nothing more and interrupts the process as Ctrl-C does
    elsewhere: in `fastsdpo online` training stops after this step, with a checkpoint.

    Args:
        stream_in, stream_out: where follow-ups are read, one a line, and questions written; None: the
            terminal, where a paste of several lines is one follow-up.
    """

    def __init__(self, stream_in: Any = None, stream_out: Any = None):
        self.stream_in, self.stream_out = stream_in, stream_out
        self.reader = MessageReader() if stream_in is None else None
        self.stopped = False

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        followups = []
        for number, (prompt, response) in enumerate(zip(prompts, responses), 1):
            where = f"{number} of {len(prompts)}"
            text = "" if self.stopped else self._ask(where, prompt[-1]["content"], response)
            if text is None:
                self.stopped = True
                signal.raise_signal(signal.SIGINT)
            followups.append("" if text is None or is_blank(text) else text.strip())
        return followups

    def _ask(self, where: str, message: str, response: str) -> str | None:
        """What the person says next; None for Ctrl-C and the end of the input."""
        print(f"\n[{where}]\nuser       {message}\nassistant  {response}", file=self.stream_out)
        question = "follow-up (empty: none; Ctrl-D: stop training) > "
        if self.stream_out is not None:
            print(question, end="", file=self.stream_out, flush=True)
            question = ""
        try:
            # The trainer's own handler would wait for the end of the step, and so for the answers to it.
            with interrupt(signal.default_int_handler):
                if self.reader is not None:
                    return self.reader.read(question)
                print(question, end="", flush=True)
                return self.stream_in.readline() or None
        except KeyboardInterrupt:
            print(file=self.stream_out)
            return None
