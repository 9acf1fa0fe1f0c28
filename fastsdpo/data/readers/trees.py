"""Trees of messages, as chat programs keep them: an edited question or a regenerated answer starts a branch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastsdpo.data.answers import clean, read_turns
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import is_blank, parse_message, show
from fastsdpo.data.readers.values import of_turns, with_system


@dataclass
class Place:
    """A node of a tree.

    Attributes:
        message: a message that `read_turns` takes, or None if the node has none.
        parent: the id of the node before it. An id that is not in the tree means that the node is a root.
        children: the ids of the nodes after it, in the order of the record.
    """

    message: Mapping | None
    parent: Any = None
    children: list[Any] = field(default_factory=list)


class Tree:
    """A tree of messages: its nodes by id, in the order in which they were added.

    Raises:
        TypeError, ValueError: an id is neither text nor a number, or is there twice.
    """

    def __init__(self):
        self.nodes: dict[Any, Place] = {}

    def add(self, name: Any, parent: Any, message: Mapping | None) -> None:
        if not isinstance(name, (str, int)):
            raise TypeError(f"a message of a tree must have an id, got {show(name)}")
        if name in self.nodes:
            raise ValueError(f"the ids of a tree's messages must differ, got {show(name)} twice")
        parent = parent if isinstance(parent, (str, int)) else None
        self.nodes[name] = Place(message, parent)

    def link(self) -> None:
        """Fills in the children of all nodes; call it when all nodes are added."""
        for name, node in self.nodes.items():
            if node.parent in self.nodes:
                self.nodes[node.parent].children.append(name)

    def path(self, leaf: Any) -> list[Any]:
        """Returns the ids from a root to the leaf. Raises ValueError if the parents form a circle."""
        path, seen = [], set()
        while leaf in self.nodes:
            if leaf in seen:
                raise ValueError("the messages of a tree must lead to a root, got a circle of parents")
            seen.add(leaf)
            path.append(leaf)
            leaf = self.nodes[leaf].parent
        return path[::-1]

    def leaves(self) -> list[Any]:
        """Returns the ids at which branches end.

        Of several answers to a question without a reply, a rating or an edit, only the first counts. None of them
        counts if another answer to the question has a reply.
        """
        leaves, parents = [], set()
        for name, node in self.nodes.items():
            if node.children:
                continue
            if _role(node) == "assistant" and node.parent in self.nodes and not _is_rated(node):
                if node.parent in parents or any(self.nodes[c].children for c in self.nodes[node.parent].children):
                    continue
                parents.add(node.parent)
            leaves.append(name)
        return leaves

    def alternatives(self, path: list[Any], start: int) -> list[str]:
        """Returns the texts of the other answers to the question that stands before ``path[start]``."""
        texts = []
        for child in self.nodes[path[start - 1]].children:
            seen: set = set()
            while child != path[start] and child not in seen:
                seen.add(child)
                node = self.nodes[child]
                said = parse_message(node.message) if node.message is not None else {"role": "", "content": ""}
                if said["role"] == "assistant" and not is_blank(said["content"]):
                    texts.append(clean(said["content"]))
                    break
                if said["role"] not in ("", "assistant") or not node.children:
                    break
                child = node.children[0]
        return texts


def _role(node: Place) -> str | None:
    return None if node.message is None else parse_message(node.message)["role"]


def _is_rated(place: Place) -> bool:
    fields = {} if place.message is None else read_turns([place.message], "messages").fields.get(0, {})
    return "rating" in fields or "edited" in fields


def read_tree(
    tree: Tree,
    leaf: Any,
    all_branches: bool,
    *,
    conversation_id: str | None = None,
    language: Any = None,
    system: Mapping | None = None,
) -> Iterator[Conversation]:
    """Yields the conversation that ends at a leaf, or those of all leaves.

    The other answers to each question become the field `alternatives`.

    Args:
        leaf: the id of the node at which the active branch ends.
        all_branches: True yields the conversations of all leaves.
        conversation_id: None: there is no such id.
        system: an object that may have a system prompt.

    Raises:
        TypeError, ValueError: a message is malformed, the parents form a circle, or there is no message.
    """
    tree.link()
    known = isinstance(leaf, (str, int)) and leaf in tree.nodes
    leaves = [leaf] if known and not all_branches else tree.leaves()
    if not leaves:
        raise ValueError("the tree of messages must have a message at its end, got none")
    for end in leaves if all_branches else leaves[-1:]:
        path = tree.path(end)
        said = [place for place, name in enumerate(path) if tree.nodes[name].message is not None]
        turns = read_turns([tree.nodes[path[place]].message for place in said], "messages")
        others: list[str] = []
        for index, (place, message) in enumerate(zip(said, turns.messages)):
            if message["role"] == "user":
                others = tree.alternatives(path, place + 1) if place + 1 < len(path) else []
            elif message["role"] == "assistant" and others:
                turns.fields.setdefault(index, {})["alternatives"] = others
        if system:
            turns = with_system(system, turns)
        yield of_turns(turns, conversation_id=conversation_id, language=language)


def named(conversations: Iterable[Conversation], name: str) -> Iterator[Conversation]:
    """Yields the conversations with the name of their layout as `format`."""
    for conversation in conversations:
        yield conversation if conversation.format else replace(conversation, format=name)
