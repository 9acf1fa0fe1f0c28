"""What is typed in a chat, answered and learned from."""

from __future__ import annotations

import argparse
import copy
import difflib
from pathlib import Path

from fastsdpo.commands.chat import LEARN
from fastsdpo.commands.running import describe_error
from fastsdpo.commands.screen import PlainScreen
from fastsdpo.data import Interaction
from fastsdpo.data.interactions import is_blank
from fastsdpo.online.chat import CONVERSATION_FILE, ChatLearner, ChatState, forget_updates, log_update
from fastsdpo.online.terminal import shortened, uninterrupted
from fastsdpo.signal import compute_signal
from fastsdpo.trainer.report import write_report

# What can be typed, and what it does: for /help and for completion.
COMMANDS = {
    "/teach": "TEXT is your reaction to the last answer: the model learns from it and answers it. Without TEXT: your "
    "last message was a reaction to the answer before it",
    "/show": "what TEXT as your reaction (without it: your last message) changes in the answer; learns nothing",
    "/undo": "takes the last update back, and the conversation since then",
    "/retry": "answers your last message again",
    "/new": "begins a new conversation; the model keeps what it has learned",
    "/system": "begins a new conversation with the system prompt TEXT. Without TEXT: shows it",
    "/learn": "always: from every message after an answer. told: from what /teach names",
    "/status": "the model, what it has learned, and the settings",
    "/save": "writes the model (the adapter, with LoRA) and its tokenizer into FOLDER",
    "/help": "these commands",
    "/quit": "ends the chat, as Ctrl-D does; with the same folder it goes on later",
}
ARGUMENTS = {"/teach": "[TEXT]", "/show": "[TEXT]", "/system": "[TEXT]", "/learn": "always|told", "/save": "FOLDER"}
ENDS = ("/quit", "/exit", "/bye")


class Talk:
    """What is typed, answered and learned from.

    Args:
        options: of the command: ``model``, ``system``, ``learn``, ``output``.
        screen: shows answers and all else.
    """

    def __init__(self, learner: ChatLearner, options: argparse.Namespace, screen: PlainScreen):
        self.learner, self.options, self.screen = learner, options, screen
        self.say = screen.say
        self.always = options.learn == "always"
        self.system = options.system
        self.unanswered: str | None = None
        self.file = Path(options.output, CONVERSATION_FILE)
        self.go_on()

    def go_on(self) -> None:
        """The conversation that the folder holds, or a new one."""
        if not self.file.exists():
            return self.start()
        talk = ChatState.from_file(self.file)
        self.learner.answers = talk.draws
        had = [message["content"] for message in talk.messages if message["role"] == "system"]
        if self.system is not None and had != [self.system]:
            self.say("a new conversation, as --system is another")
            return self.start()
        self.talk, self.system = talk, had[0] if had else None
        self._forget(self.learner.updates)
        if talk.messages[-1:] and talk.messages[-1]["role"] == "assistant":
            self.say(
                f"the conversation goes on after {_count(len(talk.messages) - len(had), 'message')} (/new begins "
                "another); the last ones:"
            )
            for message in talk.messages[-2:]:
                self.say(f"{'you' if message['role'] == 'user' else 'model'} > {message['content']}")

    def start(self) -> None:
        """A new conversation; the model keeps what it has learned."""
        self.talk = ChatState([{"role": "system", "content": self.system}] if self.system else [])
        self.unanswered = None
        self.keep()

    def keep(self) -> None:
        """Writes the conversation beside the checkpoints."""
        self.talk.draws = self.learner.answers
        write_report(self.file, self.talk.to_dict())

    def learns_from(self) -> str:
        if self.always:
            return "the model learns from every message after an answer; /learn told ends that"
        return "the model learns only when told: /teach TEXT, your reaction to its last answer"

    def status_line(self) -> str:
        """What stands below the message at a terminal."""
        learns = "from every message" if self.always else "with /teach"
        name = Path(self.options.model).name or self.options.model
        return f" {name} · {_count(self.learner.updates, 'update')} · learns {learns} · /help · Alt-Enter: new line"

    def take(self, text: str) -> None:
        """A message or a command; nothing for what nobody would see.

        Raises:
            ValueError: there is no such command, or it cannot be done; nothing has changed.
        """
        if is_blank(text):
            return
        if not text.startswith("/"):
            return self.write(text.strip(), learn=self.always and bool(self.talk.tokens))
        command, rest = [*text.split(maxsplit=1), ""][:2]
        rest = rest.strip()
        self.check(text, command, rest)
        if command == "/teach" and rest:
            self.write(rest, learn=True)
        elif command == "/teach":
            self.teach(len(self.talk.messages) - 2)
        elif command == "/show":
            self.show(rest)
        elif command == "/learn":
            self.always = rest == "always"
            self.say(self.learns_from())
        elif command == "/system" and rest:
            self.system = rest
            self.start()
            self.say("a new conversation, with that system prompt")
        elif command == "/system":
            self.say(f"the system prompt: {self.system}" if self.system else "there is no system prompt")
        elif command == "/new":
            self.start()
            self.say("a new conversation")
        elif command == "/retry":
            self.retry()
        elif command == "/save":
            with uninterrupted():
                self.save(rest)
        elif command == "/undo":
            with uninterrupted():
                self.undo()
        elif command == "/status":
            self.screen.table(self.status())
        else:
            self.screen.table([(f"{name} {ARGUMENTS.get(name, '')}", what) for name, what in COMMANDS.items()])

    def check(self, text: str, command: str, rest: str) -> None:
        """Raises ValueError where there is no such command, or not with that behind it."""
        if command in COMMANDS and command not in ENDS:
            takes = ARGUMENTS.get(command, "")
            wrong = (command == "/learn" and rest not in LEARN) or (command == "/save" and (not rest or "\n" in rest))
            if rest and is_blank(rest):
                raise ValueError(f"{command}: nobody can see anything in that text")
            if not wrong and not (rest and not takes):
                return
            form = f"the command is {command} {takes}" if takes else "nothing may follow it"
            raise ValueError(f"{command}: {form}, got {text.splitlines()[0].strip()!r}")
        near = difflib.get_close_matches(command.lower(), COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists the commands."
        raise ValueError(
            f"there is no command {text.splitlines()[0].strip()!r}; {hint} Nothing was sent. (A space before the / "
            "makes it a message.)"
        )

    def write(self, text: str, *, learn: bool = False) -> None:
        """Answers a message of the user's; with ``learn`` the model learns from it first."""
        place = len(self.talk.messages)
        try:
            if learn:
                self.teach(place, text)
            self.talk.messages.append({"role": "user", "content": text})
            if not self.reply():
                self.talk.cut(place)
        except BaseException as error:
            self.talk.cut(place)
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.unanswered = text
            self.say("cancelled; your message is left out of the conversation (/retry sends it again)")
        self.keep()

    def reply(self) -> bool:
        """Draws the answer to the last message, shows it and keeps it; False: the model said nothing."""
        place, seed = len(self.talk.messages), self.learner.new_seed()
        said, answer = self.screen.answer(lambda show: self.learner.answer(self.talk.messages, seed, show))
        if not said and len(answer.completion_ids) >= self.learner.config.max_new_tokens:
            self.say("cut while it was still reasoning; raise --max-new-tokens. It is left out of the conversation")
            return False
        self.talk.messages.append({"role": "assistant", "content": said})
        self.talk.tokens[place], self.talk.seeds[place] = answer.completion_ids, seed
        self.unanswered = None
        most, ends = self.learner.config.max_new_tokens, self.learner.end_ids
        if len(answer.completion_ids) >= most and answer.completion_ids[-1] not in ends:
            self.say(f"cut after {most} tokens; --max-new-tokens allows more")
        return True

    def retry(self) -> None:
        """Answers the last message again, the one that was cancelled or the one that was answered."""
        if self.unanswered is not None:
            return self.write(self.unanswered)
        place = len(self.talk.messages) - 1
        if place not in self.talk.tokens:
            raise ValueError("/retry: there is no answer yet")
        before = copy.deepcopy(self.talk)
        self.talk.cut(place)
        try:
            if not self.reply():
                self.talk = before
        except BaseException as error:
            self.talk = before
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.say("cancelled; the answer before stays")
        self.keep()

    def teach(self, place: int, text: str | None = None) -> None:
        """One update from the message at a place, the reaction to the answer before it.

        It shows what the reaction changes in that answer, and the answer to the same messages afterwards.

        Args:
            text: the message, where it is not there yet.

        Raises:
            ValueError: there is no answer before it, or it was learned from already.
        """
        talk = self.talk
        if place - 1 not in talk.tokens:
            raise ValueError("/teach: there is no answer that this would be a reaction to")
        if place in talk.learned:
            raise ValueError(f"/teach: your last message was learned from in update {talk.learned[place]}")
        followup = talk.messages[place]["content"] if text is None else text
        history, answer = talk.messages[: place - 1], talk.messages[place - 1]["content"]
        if not self.screen.quiet:
            self.show_signal(place - 1, followup)
        with uninterrupted(), self.screen.busy("learning"):
            before = copy.deepcopy(talk)
            figures = self.learner.learn(history, talk.tokens[place - 1], followup, before)
            update = talk.learned[place] = self.learner.updates
            log_update(self.options.output, update, history, answer, followup)
            self.say(
                f"update {update}: learned from {shortened(followup)!r} as your reaction to {shortened(answer)!r}; "
                f"/undo takes it back (loss {figures['loss']:.3f})"
            )
            self.keep()
        if not self.screen.quiet:
            self.compare(place - 1)

    def compare(self, place: int) -> None:
        """The answer at a place, and the one that the same messages get now, with the same draws."""
        history, before = self.talk.messages[:place], self.talk.messages[place]["content"]
        self.say("the same message answered before and after:")
        try:
            after, _ = self.screen.compare(
                before, lambda show: self.learner.answer(history, self.talk.seeds[place], show)
            )
        except KeyboardInterrupt:
            self.say("cancelled; what was learned stays")
            return
        if after == before:
            self.say("the same answer: one step was too little to change it. Teach it more, or raise --learning-rate")

    def show(self, text: str) -> None:
        """What a reaction would change in the answer before it; nothing is learned."""
        place = len(self.talk.messages) - (1 if text else 3)
        if place not in self.talk.tokens:
            raise ValueError("/show: there is no answer that this would be a reaction to")
        self.show_signal(place, text or self.talk.messages[place + 1]["content"])

    def show_signal(self, place: int, followup: str) -> None:
        learner = self.learner
        messages, config = self.talk.messages, learner.config
        with self.screen.busy("reading your reaction"):
            result = compute_signal(
                learner.model,
                learner.tokenizer,
                Interaction(messages[:place], messages[place]["content"], followup),
                learner.tokenize.template,
                unrelated=None,
                completion_ids=self.talk.tokens[place],
                max_prompt_length=config.max_prompt_length,
                max_completion_length=config.max_completion_length,
                max_followup_length=config.max_followup_length,
                chat_template_kwargs=config.chat_template_kwargs,
                chat_template_date=config.chat_template_date,
            )
        self.screen.signal(result, followup)

    def undo(self) -> None:
        """Takes back the last update, and the conversation since then where it is this one."""
        update = self.learner.updates
        before = self.learner.conversation_before(update)
        left = self.learner.undo()
        forget_updates(self.options.output, left)
        if before is not None and before.key == self.talk.key:
            gone = len(self.talk.messages) - len(before.messages)
            self.talk = before
            self.say(f"update {update} is taken back, and the conversation since then ({_count(gone, 'message')})")
        else:
            self._forget(left)
            self.say(f"update {update} is taken back; it came from another conversation, so this one stays")
        self.unanswered = None
        self.keep()

    def _forget(self, updates: int) -> None:
        """Reactions of later updates count as not learned from."""
        self.talk.learned = {place: update for place, update in self.talk.learned.items() if update <= updates}

    def save(self, folder: str) -> None:
        try:
            self.learner.trainer.save_model(folder)
        except OSError as error:
            raise ValueError(f"/save: {describe_error(error)}") from error
        self.say(f"saved in {folder}")

    def status(self) -> list[tuple[str, str]]:
        """Names and values of what a person may want to know."""
        learner, config = self.learner, self.learner.config
        oldest = learner.checkpoints()[0]
        temperature = config.sampling_temperature
        return [
            ("model", self.options.model),
            ("updates", f"{learner.updates}; /undo goes back to {oldest}"),
            ("learns from", "every message after an answer" if self.always else "what /teach names"),
            ("learning rate", f"{config.learning_rate:g}; teacher {config.teacher}"),
            ("conversation", _count(len(self.talk.messages), "message")),
            ("system prompt", self.system or "none"),
            ("answers", f"at most {config.max_new_tokens} tokens, temperature {temperature or 'of the model'}"),
            ("folder", self.options.output),
        ]


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")
