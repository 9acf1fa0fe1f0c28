"""Joins calls that hold only what is new: those of the Responses API, which go on from an earlier one.

Such a call names the one before it (`previous_response_id`) or its conversation (`conversation`). All calls of a
chain are kept until the files are read (tables.py) and then come as one record.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastsdpo.data.answers import Turns, rating_fields, read_turns
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import parse_message
from fastsdpo.data.readers.calls import REQUESTS, RESPONSES, is_responses, read_proxy, read_responses
from fastsdpo.data.readers.shapes import read_input, read_output
from fastsdpo.data.readers.streams import find_events, whole_response
from fastsdpo.data.readers.trees import named
from fastsdpo.data.readers.values import as_mapping, decoded, identifier, of_turns, with_system
from fastsdpo.data.times import first_time


class BrokenChain(ValueError):
    """Raised for calls that go on from one that is not there."""

    kind = "a call before it is missing"


class Link(NamedTuple):
    """A call of the Responses API: what was sent and came back, its rating, its id, what it goes on from, its time."""

    sent: Mapping
    back: Any
    rating: Mapping[str, Any]
    own: str | None
    previous: str | None
    conversation: str | None
    time: float | None

    @property
    def name(self) -> str | None:
        """The name under which it is kept until the chains are known."""
        return self.conversation or self.own or self.previous


def find_link(record: Any) -> Link | None:
    """The call in a record, alone or as request and response; None if it is none of the Responses API."""
    if not isinstance(record, Mapping):
        return None
    if is_responses(record):
        sent, back = record, {key: record[key] for key in ("output", "status", "incomplete_details") if key in record}
        response = record
    else:
        sent, back = (next((record[k] for k in keys if record.get(k)), None) for keys in (REQUESTS, RESPONSES))
        sent = as_mapping(sent)
        sent = as_mapping(sent.get("body")) or sent
        response = _response(back)
        if "input" not in sent or response is None:
            return None
    named = sent.get("conversation") or response.get("conversation")
    named = identifier(named, ("id",)) if isinstance(named, Mapping) else identifier({"id": named}, ("id",))
    previous = identifier(sent, ("previous_response_id",)) or identifier(response, ("previous_response_id",))
    times = (time for source in (record, response) if (time := first_time(source)) is not None)
    return Link(sent, back, rating_fields(record), identifier(response, ("id",)), previous, named, next(times, None))


def _response(back: Any) -> Mapping | None:
    """The response in what came back, which may be streamed or stand under ``body``."""
    found = decoded(back)
    found = found.get("body", found) if isinstance(found, Mapping) else found
    try:
        events = find_events(found) if isinstance(found, (str, list)) else None
    except ValueError:  # of no API that is known
        return None
    found = (whole_response(events) if events else None) or as_mapping(found)
    return found if found.get("object") == "response" else None


class ChainKey:
    """Names the rows of a file of such calls: a function record -> name, or None for other records."""

    def __call__(self, record: Any) -> str | None:
        link = find_link(record)
        return None if link is None else link.name

    @staticmethod
    def previous(record: Any) -> str | None:
        """The name of the call that a record goes on from, or None."""
        link = find_link(record)
        return None if link is None or link.conversation is not None else link.previous


def chain_key(record: Any) -> ChainKey | None:
    """The key of the rows in a file that begins with this record, or None if it has no such calls."""
    return None if find_link(record) is None else ChainKey()


def read_chain(records: Sequence[Any], name: str, all_branches: bool) -> Iterator[Conversation]:
    """Yields the conversations of the calls that go on from one: one for each call from which none goes on.

    Instructions hold for their call alone. Where they change, each answer with its follow-up is a record of its own.

    Raises:
        BrokenChain: a call is missing.
        TypeError, ValueError: a call is malformed.
    """
    links: list[Link] = []
    for link in map(find_link, records):
        if link is not None and (link.own is None or link not in links):  # else it is there twice
            links.append(link)
    if len(links) == 1 and links[0].conversation is None and links[0].previous is None:
        reader, format = (read_responses, "openai-responses") if is_responses(records[0]) else (read_proxy, "proxy")
        yield from named(reader(records[0], all_branches), format)
        return
    before = _before(links)
    followed = {number for number in before if number is not None}
    if len(followed) == len(links):
        raise ValueError("calls must go on from earlier ones, got a circle of them")
    for number in range(len(links)):
        if number not in followed:
            path: list[Link] = []
            place: int | None = number
            while place is not None:
                path.append(links[place])
                place = before[place]
            yield from named(_read_path(path[::-1], name), "openai-responses")


def _before(links: list[Link]) -> list[int | None]:
    """Of each call, the number of the one that it goes on from."""
    before: list[int | None] = [None] * len(links)
    numbers = {link.own: number for number, link in enumerate(links) if link.own is not None}
    if len(numbers) < sum(link.own is not None for link in links):
        raise ValueError("the ids of the calls of a conversation must differ")
    if links[0].conversation is not None:
        if len(links) > 1 and any(link.time is None for link in links):
            raise ValueError("the calls of a conversation must have times (created_at), which say their order")
        order = sorted(range(len(links)), key=lambda number: links[number].time or 0)
        for one, other in itertools.pairwise(order):
            before[other] = one
        return before
    for number, link in enumerate(links):
        if link.previous is not None and link.previous not in numbers:
            raise BrokenChain(
                f"a call goes on from {link.previous!r:.60} (previous_response_id), which is not in the data; "
                "add that response, with what was sent as 'input'"
            )
        before[number] = None if link.previous is None else numbers[link.previous]
    return before


def _read_path(links: list[Link], name: str) -> Iterator[Conversation]:
    """The conversations of calls of which each goes on from the one before."""
    said: list[Any] = []
    parsed: list[dict] = []
    ends: list[int] = []  # of each call, how many messages there are before its answer
    systems: list[dict[str, Any]] = []
    for link in links:
        sent, system = read_input({k: v for k, v in link.sent.items() if k in ("input", "instructions")}, "input")
        new = [parse_message(message) for message in sent]
        if new[: len(parsed)] == parsed:  # with the whole history, as some log it
            sent, new = sent[len(parsed) :], new[len(parsed) :]
        try:
            answers = read_output(link.back, "output")[0]
        except (TypeError, ValueError):
            if link is not links[-1]:
                raise
            answers = []  # it failed, and what the user said stands in it
        if answers:
            answers = [*answers[:-1], {**answers[-1], **link.rating}]
        ends.append(len(said) + len(sent))
        said += [*sent, *answers]
        parsed += [*new, *(parse_message(answer) for answer in answers)]
        systems.append(system)
    if all(system == systems[0] for system in systems):
        turns = with_system(systems[0], read_turns(said, "input and output"))
        yield of_turns(turns, conversation_id=name)
        return
    for end, system in zip(ends[1:], systems):
        turns = with_system(system, read_turns(said[:end], "input and output"))
        roles = [message["role"] for message in turns.messages]
        other = next((n for n, role in enumerate(roles) if role not in ("system", "user", "assistant")), None)
        if other is not None and "user" in roles[:other]:  # nothing is taken from there on; what stands before, was
            first = roles.index("user")
            turns = Turns([turns.messages[first], *turns.messages[other:]])
        if roles[-1] == "user":
            yield replace(of_turns(turns, conversation_id=name), single=True)
