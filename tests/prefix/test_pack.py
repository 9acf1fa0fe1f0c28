"""The plan against brute force: every distinct prefix is one token and sees exactly its prefixes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsdpo.prefix import build_plan, count_tokens, pack_conversations
from fastsdpo.prefix.plan import response_labels
from tests.prefix.conftest import tokenized as interaction

# Two letters and short lists: nearly everything shares, nests, branches or coincides.
ids = st.lists(st.integers(0, 1), min_size=1, max_size=6)
interactions_strategy = st.lists(st.builds(interaction, ids, ids, ids), min_size=1, max_size=6)
sharing_strategy = st.sampled_from(["conversation", "interaction"])


def sequences(items, sharing):
    """(trie, ids of the student, ids of the teacher) per interaction."""
    for n, item in enumerate(items):
        student, teacher = (*item.prompt_ids, *item.completion_ids), (*item.teacher_prompt_ids, *item.completion_ids)
        yield n if sharing == "interaction" else 0, student, teacher


def prefixes_of_packed_tokens(plan):
    """What each packed token sees, itself last, read off the runs."""
    token_ids, positions = plan.token_ids.tolist(), plan.position_ids.tolist()
    found = []
    for run in plan.runs:
        above = [row for segment in run.ancestors for row in range(segment.start, segment.stop)]
        for segment in run.ancestors:
            assert positions[segment.start] == segment.position
        assert positions[run.start] == run.position
        for row in range(run.start, run.stop):
            assert row == len(found)
            path = [*above, *range(run.start, row + 1)]
            assert [positions[i] for i in path] == list(range(len(path)))
            found.append((tuple(path), tuple(token_ids[i] for i in path)))
    assert len(found) == plan.tokens
    return found


@given(interactions_strategy, sharing_strategy)
@settings(max_examples=120, deadline=None)
def test_plan_equals_brute_force(items, sharing):
    plan = build_plan(items, sharing=sharing)
    found = prefixes_of_packed_tokens(plan)

    wanted_students, wanted = set(), set()
    for trie, student, teacher in sequences(items, sharing):
        wanted_students |= {(trie, student[: n + 1]) for n in range(len(student))}
        wanted |= {(trie, teacher[: n + 1]) for n in range(len(teacher))}
    wanted |= wanted_students
    assert plan.tokens == len(wanted)
    assert plan.student_tokens == len(wanted_students)
    if sharing == "conversation":
        assert {prefix for _, prefix in found} == {prefix for _, prefix in wanted}
        students = {prefix for _, prefix in found[: plan.student_tokens]}
        assert students == {prefix for _, prefix in wanted_students}
    for path, _ in found[: plan.student_tokens]:
        assert max(path) < plan.student_tokens  # the students' tokens are a plan of their own

    # Visibility by the walk's times is visibility by paths.
    start, stop = plan.subtree_start, plan.subtree_stop
    by_times = (start[None, :] <= start[:, None]) & (start[:, None] < stop[None, :])
    by_paths = torch.zeros(plan.tokens, plan.tokens, dtype=torch.bool)
    for row, (path, _) in enumerate(found):
        by_paths[row, list(path)] = True
    assert torch.equal(by_times, by_paths)

    # Every response token is predicted by the row whose prefix is all that comes before it.
    n, labels = 0, response_labels(items, torch.device("cpu"))
    for index, item in enumerate(items):
        for t, target in enumerate(item.completion_ids):
            before = tuple(item.completion_ids[:t])
            assert found[plan.student_rows[n]][1] == (*item.prompt_ids, *before)
            assert found[plan.teacher_rows[n]][1] == (*item.teacher_prompt_ids, *before)
            assert [int(label[n]) for label in labels] == [target, index, t]
            n += 1
    assert n == len(plan.student_rows) == len(plan.teacher_rows) == len(labels.target_ids)

    counts = count_tokens(items, sharing=sharing)
    assert (counts.student, counts.teacher) == (plan.student_tokens, plan.teacher_tokens)


@given(interactions_strategy, sharing_strategy)
@settings(max_examples=40, deadline=None)
def test_one_sided_plans(items, sharing):
    both = build_plan(items, sharing=sharing)
    alone = build_plan(items, sharing=sharing, teachers=False)
    assert len(alone.teacher_rows) == alone.teacher_tokens == 0
    assert torch.equal(alone.token_ids, both.token_ids[: both.student_tokens])
    assert torch.equal(alone.student_rows, both.student_rows)

    teacher = build_plan(items, sharing=sharing, students=False)
    found = prefixes_of_packed_tokens(teacher)
    assert len(teacher.student_rows) == teacher.student_tokens == 0
    distinct = {(trie, ids[: n + 1]) for trie, _, ids in sequences(items, sharing) for n in range(len(ids))}
    assert teacher.tokens == len(distinct)
    firsts = itertools.accumulate([0, *(len(item.completion_ids) for item in items)])
    for item, at in zip(items, firsts):
        assert found[teacher.teacher_rows[at]][1] == tuple(item.teacher_prompt_ids)


def test_a_conversation_is_one_run_when_histories_nest():
    turns = [list(range(100 * t, 100 * t + 50)) for t in range(8)]
    items, history = [], []
    for t in range(0, 8, 2):
        history = history + turns[t]
        items.append(interaction(history, [*history, 999, 1000 + t], turns[t + 1]))
        history = history + turns[t + 1]
    plan = build_plan(items)
    assert plan.student_tokens == len(history)
    assert [run.ancestors for run in plan.runs if run.start < plan.student_tokens] == [()]
    # each teacher: the hindsight block and the response, below one unbroken slice of the students'
    assert plan.teacher_tokens == 4 * (2 + 50)
    assert all(len(run.ancestors) == 1 for run in plan.runs[1:])


def test_ancestors_are_few_pieces():
    """A comb of 64 branches off one chain, and a complete binary tree: at most log2 pieces."""
    comb = [interaction([0] * n, [0] * n + [1], [2, 3]) for n in range(1, 65)]
    plan = build_plan(comb)
    assert max(len(run.ancestors) for run in plan.runs) <= 2
    tree = [interaction([1], [1], [2 + (n >> k & 1) for k in range(7)]) for n in range(128)]
    plan = build_plan(tree)
    assert max(len(run.ancestors) for run in plan.runs) <= math.log2(plan.tokens) + 1


def test_linear_in_comparisons_of_tokens():
    """A long history that every turn repeats: each token is compared a bounded number of times."""

    class Token(int):
        compared = 0

        def __eq__(self, other):
            Token.compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    def tokens(values):  # new objects: equal ones are not identical
        return list(map(Token, values))

    history = list(range(2000))
    items = []
    for turn in range(10):
        answer = [5000 + turn] * 100
        items.append(interaction(tokens(history), tokens([*history, 9999]), tokens(answer)))
        history = history + answer
    counts = count_tokens(items)
    total = counts.unshared_student + counts.unshared_teacher
    assert 0 < Token.compared < 1.2 * total


def test_bad_arguments():
    one = [interaction([1], [1], [1])]
    for call, words in [
        (lambda: build_plan([]), "interactions must not be empty"),
        (lambda: build_plan(one, sharing="off"), r"sharing must be .* got 'off'"),
        (lambda: build_plan(one, students=False, teachers=False), "students or teachers"),
        (lambda: count_tokens(one, sharing="all"), "sharing must be"),
        (lambda: pack_conversations(one, [[0]], max_tokens=0), "max_tokens must be >= 1"),
        (lambda: pack_conversations(one, [[0]], max_tokens=8, open_packs=0), "open_packs must be >= 1"),
        (lambda: pack_conversations(one, [[1]], max_tokens=8), r"conversations\[0\] must hold indices"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    for field in ("prompt_ids", "teacher_prompt_ids", "completion_ids"):
        items = [interaction([1], [1], [1]), interaction([1], [1], [1])]
        setattr(items[1], field, [])
        for function in (build_plan, count_tokens):
            with pytest.raises(ValueError, match=rf"interactions\[1\]\.{field} must not be empty"):
                function(items)


GROUPS = st.lists(interactions_strategy, min_size=1, max_size=8)
SHARING = st.sampled_from(["conversation", "interaction", "off"])


@given(GROUPS, SHARING, st.integers(1, 60), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_packs_hold_everything_once_within_the_budget(groups, sharing, budget, open_packs):
    items = [item for group in groups for item in group]
    starts = [sum(len(g) for g in groups[:k]) for k in range(len(groups))]
    conversations = [list(range(a, a + len(g))) for a, g in zip(starts, groups)]
    packs = pack_conversations(items, conversations, max_tokens=budget, sharing=sharing, open_packs=open_packs)
    assert sorted(index for pack in packs for index in pack) == list(range(len(items)))
    for pack in packs:
        counts = count_tokens([items[i] for i in pack], sharing=sharing)
        assert counts.student + counts.teacher <= budget or len(pack) == 1
    again = pack_conversations(items, conversations, max_tokens=budget, sharing=sharing, open_packs=open_packs)
    assert packs == again


def test_packs_are_full_and_follow_the_given_order():
    generator = torch.Generator().manual_seed(0)
    items, conversations = [], []
    for number in range(300):
        length = int(torch.randint(10, 120, (), generator=generator))
        items.append(interaction([number] * length, [number] * length + [0], [1] * 5))
        conversations.append([number])
    packs = pack_conversations(items, conversations, max_tokens=1000)
    tokens = [sum(count_tokens([items[i] for i in p])[:2]) for p in packs]
    assert sum(tokens) > 0.93 * 1000 * len(packs)
    order = [index for pack in packs for index in pack]
    assert sum(abs(at - index) for at, index in enumerate(order)) / len(order) < 20
