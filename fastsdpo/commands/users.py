"""Which user reacts, or which language model judges: the options of `online` and `eval`."""

from __future__ import annotations

import argparse
from typing import Any

from fastsdpo.commands.options import refuse
from fastsdpo.online.endpoint import ChatEndpoint
from fastsdpo.online.personas import PERSONAS, read_persona
from fastsdpo.online.users import (
    EndpointUser,
    LocalChat,
    RuleUser,
    SwitchingUser,
    TerminalUser,
    UnrelatedUser,
    UserSimulator,
    UserWording,
)

PERSONA_HELP = (
    f"Who the user is and what they want, in words, or one of {', '.join(PERSONAS)}. @FILE reads it from a file."
)


def add_user_options(parser: argparse.ArgumentParser) -> None:
    """Who reacts; read by `make_user`."""
    user = parser.add_argument_group("user")
    user.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A wish that is checked by rule. Of several, an answer has to fulfil all.",
    )
    user.add_argument(
        "--wish",
        metavar="TEXT",
        help="What the user says about an answer that breaks a rule. Default: the rule's own words.",
    )
    user.add_argument(
        "--praise", metavar="TEXT", help="What the user says about an answer that breaks none. Default: nothing."
    )
    user.add_argument("--persona", metavar="TEXT", help=PERSONA_HELP)
    user.add_argument(
        "--user-prompt",
        metavar="FILE",
        help="How the language model that plays the user is asked: a text with {history} and {response}. What "
        "stands before a line of three dashes is the system prompt, with {persona}. Default: our own text.",
    )
    add_chat_model_options(user, "user")
    user.add_argument(
        "--control",
        action="store_true",
        help="A control run: where a rule is broken, the user speaks of something else (a cat, the rain). What "
        "such a run changes is not learned from what the user wants.",
    )
    user.add_argument("--terminal", action="store_true", help="You are the user.")
    _add_later_wishes(user)


def _add_later_wishes(user: argparse._ArgumentGroup) -> None:
    """What the user wants from --flip-at on."""
    user.add_argument(
        "--flip-at",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="From interaction N on, --then-rule, --then-wish or --then-persona holds. Once more for a third "
        "persona. Default: never.",
    )
    user.add_argument(
        "--then-rule", action="append", default=[], metavar="NAME=VALUE", help="A wish from --flip-at on."
    )
    user.add_argument(
        "--then-wish", metavar="TEXT", help="What the user says from then on. Default: the rule's own words."
    )
    user.add_argument(
        "--then-persona",
        action="append",
        default=[],
        metavar="TEXT",
        help="Who the user is from --flip-at on. Once for each --flip-at.",
    )


def add_chat_model_options(group: Any, role: str) -> None:
    """A language model behind an endpoint or on this machine; read by `chat_model`.

    Args:
        group: a parser or a group of one.
        role: the flags are ``--{role}-url`` and so on.
    """
    group.add_argument(
        f"--{role}-url", metavar="URL", help="The address of an OpenAI-compatible server, such as http://host:8000/v1."
    )
    group.add_argument(f"--{role}-model", metavar="NAME", help="The model's name on that server.")
    group.add_argument(
        f"--{role}-local", metavar="MODEL", help="A model on this machine instead: a folder, a hub id or a GGUF file."
    )
    group.add_argument(
        f"--{role}-timeout", type=float, default=60.0, metavar="SECONDS", help="How long to wait for a reply."
    )
    group.add_argument(
        f"--{role}-concurrency", type=int, default=8, metavar="REQUESTS", help="How many requests are sent at once."
    )


# What asks a language model to play the user.
MODEL_OPTIONS = ("user-prompt", "user-url", "user-model", "user-local", "user-timeout", "user-concurrency")

USER_OPTIONS = (
    "rule",
    "wish",
    "praise",
    "flip_at",
    "then_rule",
    "then_wish",
    "persona",
    "then_persona",
    "user_prompt",
    "user_url",
    "user_model",
    "user_local",
    "control",
    "terminal",
)


def given_user_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that name the user, without those that were not given."""
    given = vars(options)
    return {name: given[name] for name in USER_OPTIONS if given[name] not in (None, [], False)}


def make_user(options: argparse.Namespace) -> UserSimulator:
    """The user of the options.

    Raises:
        ValueError: none is named, several are, or one only in part.
    """
    named = {
        "--rule (or --wish)": bool(options.rule or options.wish),
        "--persona": options.persona is not None,
        "--terminal": options.terminal,
    }
    if sum(named.values()) != 1:
        chosen = [name for name, given in named.items() if given]
        raise ValueError(f"name one user: {', '.join(named)}; got {' and '.join(chosen) or 'none'}")
    if options.persona is None:
        refuse(options, MODEL_OPTIONS, "needs --persona")
    if not (options.rule or options.then_rule):
        refuse(options, ("praise",), "needs a user of rules (--rule): one with a wish alone is never content")
    thens = bool(options.then_rule or options.then_wish) or len(options.then_persona)
    if len(options.flip_at) != thens:
        raise ValueError(
            "--flip-at needs --then-rule, --then-wish or one --then-persona for each, and they need --flip-at"
        )
    if options.then_persona and (options.persona is None or options.then_rule or options.then_wish):
        raise ValueError("--then-persona goes with --persona, and without --then-rule and --then-wish")
    if options.flip_at and not (options.rule or options.wish or options.then_persona):
        raise ValueError("--flip-at needs a user of rules (--rule), or --persona with --then-persona")
    starts = [0, *options.flip_at]
    if starts != sorted(set(starts)):
        raise ValueError(f"--flip-at must be at least 1 and ascend, got {' '.join(map(str, options.flip_at))}")
    if options.control and not options.rule:
        raise ValueError("--control needs a user of rules (--rule)")
    if options.terminal:
        return TerminalUser()
    if options.persona is not None:
        personas = [read_persona(text) for text in (options.persona, *options.then_persona)]
        wording = UserWording.read(options.user_prompt)
        endpoint = chat_model(options, "user")
        users = [EndpointUser(endpoint, persona, wording) for persona in personas]
        return users[0] if len(users) == 1 else SwitchingUser(list(zip(starts, users)))
    first: Any = RuleUser(options.rule, wish=options.wish, praise=options.praise)
    first = UnrelatedUser(first) if options.control else first
    if not options.flip_at:
        return first
    then: Any = RuleUser(options.then_rule, wish=options.then_wish, praise=options.praise)
    then = UnrelatedUser(then) if options.control else then
    return SwitchingUser([(0, first), (options.flip_at[0], then)])


def chat_model(options: argparse.Namespace, role: str, **settings: Any) -> ChatEndpoint | LocalChat:
    """The language model of ``--{role}-url`` and ``--{role}-model``, or of ``--{role}-local``.

    Args:
        **settings: of `LocalChat`; ``max_new_tokens`` bounds an endpoint's answers too.

    Raises:
        ValueError: neither, both, or a url without a model.
    """
    given = vars(options)
    url, name, local = (given[f"{role}_{part}"] for part in ("url", "model", "local"))
    if (url is None) == (local is None):
        raise ValueError(f"name either --{role}-url with --{role}-model, or --{role}-local")
    if url is None:
        remote = (f"{role}-{part}" for part in ("model", "timeout", "concurrency"))
        refuse(options, remote, f"needs --{role}-url")
        from fastsdpo.modeling import load_model_and_tokenizer

        model, tokenizer = load_model_and_tokenizer(local)
        return LocalChat(model, tokenizer, seed=0, **settings)
    if name is None:
        raise ValueError(f"--{role}-url needs --{role}-model")
    if "max_new_tokens" in settings:
        settings["max_tokens"] = settings.pop("max_new_tokens")
    return ChatEndpoint(
        url, name, timeout=given[f"{role}_timeout"], concurrency=given[f"{role}_concurrency"], **settings
    )
