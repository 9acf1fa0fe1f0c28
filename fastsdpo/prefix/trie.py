"""Radix tries over token ids: sequences that share a prefix share its nodes."""

from __future__ import annotations

from collections.abc import Sequence


class Node:
    """The tokens ``ids[start:stop]``, at positions ``[start, stop)`` of every sequence that goes through the node."""

    __slots__ = ("children", "heavy", "ids", "packed", "parent", "start", "stop", "teacher", "tokens")

    def __init__(self, ids: Sequence[int], start: int, parent: Node | None, teacher: bool):
        self.ids, self.start, self.stop, self.parent = ids, start, len(ids), parent
        self.teacher = teacher
        self.children: dict[int, Node] = {}
        self.packed = -1  # packed index of the first token; -1: not laid out yet
        self.tokens = 0  # in this node and in those below it that are of the same side (student's or teacher's)
        self.heavy: Node | None = None  # the child that the run goes on with


def first_difference(a: Sequence[int], b: Sequence[int], start: int, stop: int) -> int:
    """The first index in ``[start, stop)`` where the lists differ, else ``stop``."""
    while start < stop:
        step = min(start + 64, stop)
        if a[start:step] == b[start:step]:
            start = step
            continue
        while a[start] == b[start]:
            start += 1
        return start
    return stop


def insert(root: Node, ids: Sequence[int], teacher: bool) -> tuple[Node, int]:
    """Adds a sequence; the node with which it ends, and how many of its tokens were new."""
    node, start = root, 0
    while start < len(ids):
        child = node.children.get(ids[start])
        if child is None:
            child = Node(ids, start, node, teacher)
            node.children[ids[start]] = child
            return child, len(ids) - start
        start = first_difference(child.ids, ids, start + 1, min(child.stop, len(ids)))
        if start < child.stop:
            # Split. The upper half becomes the new node: sequences that end in `child` still do.
            upper = Node(child.ids, child.start, node, child.teacher)
            upper.stop = start
            node.children[child.ids[child.start]] = upper
            upper.children[child.ids[start]] = child
            child.start, child.parent = start, upper
            child = upper
        node = child
    return node, 0


def preorder(root: Node) -> list[Node]:
    """Parents before children; the child that a run goes on with, where it is known, after its siblings."""
    nodes, stack = [], list(reversed(root.children.values()))
    while stack:
        node = stack.pop()
        nodes.append(node)
        children = [child for child in node.children.values() if child is not node.heavy]
        stack.extend(reversed(children if node.heavy is None else [*children, node.heavy]))
    return nodes
