"""Interactions of a conversation, hindsight templates, and which conversations are kept."""

import dataclasses
import random
from collections import Counter

import pytest

from fastsdpo.data import Conversation, ConversationFilter, HindsightTemplate, Interaction, extract_interactions
from fastsdpo.data.filters import PRESETS
from fastsdpo.data.interactions import is_blank, parse_messages


def messages(*turns):
    """("u", "hi"), ("a", "hello"), ... -> messages."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": roles[role], "content": text} for role, text in turns]


def shown(interactions):
    return [([message["content"] for message in i.prompt], i.completion, i.followup) for i in interactions]


FIVE = messages(("u", "q0"), ("a", "y1"), ("u", "o1"), ("a", "y2"), ("u", "o2"), ("a", "y3"), ("u", "o3"))


class TestExtract:
    def test_every_answered_and_followed_message(self):
        interactions = extract_interactions(Conversation(FIVE, id="c"))
        assert shown(interactions) == [
            (["q0"], "y1", "o1"),
            (["q0", "y1", "o1"], "y2", "o2"),
            (["q0", "y1", "o1", "y2", "o2"], "y3", "o3"),
        ]
        assert [i.id for i in interactions] == ["c:0", "c:1", "c:2"]
        assert {i.conversation_id for i in interactions} == {"c"}

    def test_every_followup_is_in_an_interaction_or_counted(self):
        draw = random.Random(0)
        for _ in range(2000):
            turns = messages(*((draw.choice("uuuuaaaast"), draw.choice(["", "x", "y", "z"])) for _ in range(8)))
            roles = "".join(m["role"][0] for m in turns).replace("s", "").replace("t", "a")
            left_out = Counter()
            assert len(extract_interactions(turns, left_out=left_out)) + left_out.total() == roles.count("au")

    @pytest.mark.parametrize("turns", [[], FIVE[:1], FIVE[:2], FIVE[1:2], FIVE[1:3]])
    def test_too_short(self, turns):
        assert extract_interactions(turns) == []

    @pytest.mark.parametrize(
        ("limit", "histories"),
        [
            (1, [["q0"], ["o1"], ["o2"]]),
            (2, [["q0"], ["o1"], ["o2"]]),  # the cut would start with an answer: drop it too
            (3, [["q0"], ["q0", "y1", "o1"], ["o1", "y2", "o2"]]),
            (5, [["q0"], ["q0", "y1", "o1"], ["q0", "y1", "o1", "y2", "o2"]]),
        ],
    )
    def test_history_window(self, limit, histories):
        interactions = extract_interactions(FIVE, max_history_messages=limit)
        assert [prompt for prompt, _, _ in shown(interactions)] == histories
        for interaction in interactions:
            assert interaction.prompt[0]["role"] == interaction.prompt[-1]["role"] == "user"

    def test_window_does_not_count_and_keeps_the_system_message(self):
        turns = messages(("s", "be brief")) + FIVE
        for interaction in extract_interactions(turns, max_history_messages=1):
            assert [m["role"] for m in interaction.prompt] == ["system", "user"]

    def test_two_system_messages_are_one_and_an_empty_one_stays(self):
        turns = messages(("s", "a"), ("s", "b")) + FIVE[:3]
        assert extract_interactions(turns)[0].prompt[0]["content"] == "a\n\nb"
        turns = messages(("s", "")) + FIVE[:3]
        assert [m["role"] for m in extract_interactions(turns)[0].prompt] == ["system", "user"]

    def test_same_role_in_a_row_is_one_message(self):
        turns = messages(("u", "q"), ("u", "more"), ("a", "y"), ("a", " "), ("a", "y\n"), ("u", "o"), ("u", "p"))
        assert shown(extract_interactions(turns)) == [(["q\n\nmore"], "y\n", "o\n\np")]

    @pytest.mark.parametrize("answers", [("y", "z"), ("y", "z", ""), ("z", "y", "z"), ("", "y", "z")])
    @pytest.mark.parametrize("before", [(), (("a", "lost context"),), (("s", "be brief"),)])
    def test_different_answers_in_a_row_are_no_answer(self, before, answers):
        turns = messages(*before, ("u", "q"), *(("a", text) for text in answers), ("u", "o"), ("a", "x"), ("u", "p"))
        left_out = Counter()
        (interaction,) = extract_interactions(turns, left_out=left_out)
        assert [m["content"] for m in interaction.prompt if m["role"] != "system"] == ["q", "z", "o"]
        assert (interaction.completion, interaction.followup) == ("x", "p")
        lost = {"to an answer before the user's first message": 1} if before == (("a", "lost context"),) else {}
        assert left_out == {"to several answers in a row": 1, **lost}

    @pytest.mark.parametrize("role", ["t", "s"])
    def test_nothing_after_a_tool_or_later_system_message(self, role):
        turns = FIVE[:3] + messages((role, "{}")) + FIVE[3:]
        assert shown(extract_interactions(turns)) == [(["q0"], "y1", "o1")]
        assert extract_interactions(FIVE[:1] + messages((role, "{}")) + FIVE[1:]) == []

    @pytest.mark.parametrize(("empty", "left"), [(0, ["o2", "o3"]), (1, ["o2", "o3"]), (2, ["o3"]), (3, ["o1", "o3"])])
    def test_empty_message_gives_no_interaction_but_stays_in_histories(self, empty, left):
        turns = [dict(message) for message in FIVE]
        turns[empty]["content"] = " \n"
        interactions = extract_interactions(turns)
        assert [i.followup for i in interactions] == left
        assert interactions[-1].prompt[empty]["content"] == " \n"

    @pytest.mark.parametrize("role", [2, 3, 4])  # what is answered, the answer, the follow-up
    @pytest.mark.parametrize(
        "unseen", ["\u200b", "\ufeff", "\u2060\u200d", "\u200e \u200f", " \u200b\n", "\xad\u3164\0"]
    )
    def test_what_nobody_sees_is_empty(self, unseen, role):
        turns = [dict(message) for message in FIVE]
        turns[role]["content"] = unseen
        assert is_blank(unseen)
        expected = [dict(message) for message in FIVE]
        expected[role]["content"] = " "
        found, wanted = extract_interactions(turns), extract_interactions(expected)
        assert [i.followup for i in found] == [i.followup for i in wanted]

    @pytest.mark.parametrize("text", ["\u200fشكرا \u200b جزيلا", "\u200b.", "❤\ufe0f", "\u0600", "👍"])
    def test_what_is_seen_is_kept_as_it_is(self, text):
        assert not is_blank(text)
        turns = [*FIVE[:2], {"role": "user", "content": text}]
        assert [i.followup for i in extract_interactions(turns)] == [text]

    def test_input_is_not_changed_or_shared(self):
        turns = [dict(message) for message in FIVE]
        first, second, _ = extract_interactions(turns)
        first.prompt[0]["content"] = "changed"
        assert turns == FIVE and second.prompt[0]["content"] == "q0"

    def test_bad_window(self):
        with pytest.raises(ValueError, match="max_history_messages must be at least 1, got 0"):
            extract_interactions(FIVE, max_history_messages=0)


class TestMessages:
    @pytest.mark.parametrize(
        ("message", "error", "text"),
        [
            ("hi", TypeError, r"x\[0\]: must be a message, got str 'hi'"),
            (None, TypeError, "must be a message, got NoneType"),
            ({"content": "a"}, TypeError, "must have 'role' or 'from', got the keys"),
            ({"role": 3, "content": "a"}, TypeError, "role must be text, got int 3"),
            ({"role": "wizard", "content": "a"}, ValueError, "role must be one of .*'wizard'"),
            ({"role": "user<|im_end|>", "content": ""}, ValueError, "role must be one of"),
            ({"role": "user", "content": 3}, TypeError, "content must be text, got int 3"),
            ({"role": "user", "content": {"a": 1}}, TypeError, "content must be text, got dict"),
            ({"role": "user", "content": [{"text": 3}]}, TypeError, "content must be text, got a part dict"),
            ({"role": "user", "content": "a\ud800"}, ValueError, "lone surrogate at character 1"),
            ({"role": "user", "text": "a"}, TypeError, "'content', got the keys 'role', 'text' .--map content="),
            ({"role": "bot", "said": [{"text": "a"}]}, TypeError, "got the keys 'role', 'said'"),
        ],
    )
    def test_malformed(self, message, error, text):
        with pytest.raises(error, match=text):
            parse_messages([message], "x")

    def test_text_in_blocks(self):
        """LlamaIndex's; and what has no text at all is silent."""
        blocks = [{"block_type": "text", "text": "a"}, {"block_type": "text", "text": "b"}]
        said = [{"role": "user", "blocks": blocks}, {"role": "assistant", "name": "x", "reasoning": "so it is"}]
        assert parse_messages(said, "x") == messages(("u", "ab"), ("a", ""))

    def test_message_of_an_error_stays_short(self):
        nested = []
        for _ in range(10_000):
            nested = [nested]
        for value in ("x" * 10_000_000, nested, {"k" * 10**6: "v" * 10**6}):
            with pytest.raises(TypeError) as caught:
                parse_messages([{"role": "user", "content": {"text": value}}], "x")
            assert len(str(caught.value)) < 1000


class TestInteraction:
    user = messages(("u", "q"))

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            (([], "y", "o"), TypeError, "prompt must be a list of at least one message, got list"),
            (("q", "y", "o"), TypeError, "prompt must be a list of at least one message, got str 'q'"),
            ((["q"], "y", "o"), TypeError, r"prompt\[0\] must be a dict with 'role'"),
            (([{"role": "user", "content": 1}], "y", "o"), TypeError, "text as its content"),
            ((FIVE[:2], "y", "o"), ValueError, "prompt must end with a user's message, got role 'assistant'"),
            ((user, None, "o"), TypeError, "completion must be text, got NoneType"),
            ((user, "y", 5), TypeError, "followup must be text, got int 5"),
        ],
    )
    def test_refused(self, arguments, error, text):
        with pytest.raises(error, match=text):
            Interaction(*arguments)


class TestTemplates:
    prompt = messages(("u", "first"), ("a", "y"), ("u", "last {o} {0} {prompt}"))

    @pytest.mark.parametrize(
        ("name", "suffix"),
        [
            (
                "offline-v1",
                "\n\n[HINDSIGHT CONTEXT]\nThe following is a user response to your previous, "
                "insufficient attempt. Improve your response to the user prompt.\n"
                "Future User Message: no, {o} {x}!",
            ),
            (
                "online-v1",
                "\n\n=== HINDSIGHT CONTEXT ===\n[The following is a future user message. Use this "
                "to guide your answer to the user prompt.]\nno, {o} {x}!",
            ),
            (
                "paper-table1",
                "\n\n<hindsight context> The following is a future user message. Use this to guide "
                "your answer to the user prompt: no, {o} {x}!",
            ),
            ("note", "\n\nNote: no, {o} {x}!"),
        ],
    )
    def test_exact_text(self, name, suffix):
        template = HindsightTemplate.preset(name)
        result = template.apply(self.prompt, "\n no, {o} {x}!  ")
        assert result[-1]["content"] == "last {o} {0} {prompt}" + suffix
        assert result[:-1] == self.prompt[:-1]
        assert self.prompt[-1]["content"] == "last {o} {0} {prompt}"  # not changed in place
        assert HindsightTemplate.parse(name) == template

    def test_own_text(self):
        assert HindsightTemplate.parse("<{o}> {braces}").render(" a ") == "<a> {braces}"

    def test_parts(self):
        prompt = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
        assert HindsightTemplate("({o})").apply(prompt, "o")[0]["content"] == "q(o)"
        prompt = [{"role": "user", "content": [{"type": "image"}]}]
        with pytest.raises(TypeError, match="content must be text, got a part"):
            HindsightTemplate("({o})").apply(prompt, "o")

    def test_refused(self):
        with pytest.raises(ValueError, match=r"text must contain \{o\} exactly once, got 'x'"):
            HindsightTemplate("x")
        with pytest.raises(ValueError, match="exactly once"):
            HindsightTemplate("{o}{o}")
        with pytest.raises(TypeError, match="text must be a string, got int"):
            HindsightTemplate(3)
        with pytest.raises(ValueError, match=r"name must be one of offline-v1, .* got 'v1'"):
            HindsightTemplate.parse("v1")
        with pytest.raises(ValueError, match="followup must be text that is not blank"):
            HindsightTemplate("{o}").render(" \n")
        with pytest.raises(ValueError, match="followup must be text that is not blank"):
            HindsightTemplate("{o}").render("\u200b")
        with pytest.raises(ValueError, match="prompt must end with a user's message"):
            HindsightTemplate("{o}").apply(self.prompt[:2], "o")


def three(q="q", y="y", o="o"):
    return {"messages": messages(("u", q), ("a", y), ("u", o))}


class TestFilter:
    @pytest.mark.parametrize(
        ("preset", "change", "reason"),
        [
            ("wildchat", {}, None),
            ("wildchat", {"language": "en"}, None),
            ("wildchat", {"language": "German"}, "other language"),
            ("wildchat", {"language": None}, "no language given"),
            ("wildfeedback", {"language": "German"}, None),
            ("wildchat", {"messages": FIVE[:2]}, "fewer than 3 messages"),
            ("wildchat", {"messages": messages(("s", "s")) + FIVE[:2]}, "fewer than 3 messages"),
            ("wildchat", three(y="y" * 4097), "assistant message over 4,096 characters"),
            ("wildchat", three(y="y" * 4096), None),
            ("wildchat", three("q" * 4097), "user message over 4,096 characters"),
            ("wildfeedback", three("q" * 4097), None),
            ("wildfeedback", three("q" * 100_000), "conversation over 100,000 characters"),
            ("none", {"messages": [], "language": None}, None),
        ],
    )
    def test_reasons(self, preset, change, reason):
        conversation = dataclasses.replace(Conversation(FIVE, language="English"), **change)
        assert ConversationFilter.preset(preset).reason_to_drop(conversation) == reason

    def test_presets_are_the_papers(self):
        wildchat = PRESETS["wildchat"]
        assert (wildchat.max_history_messages, wildchat.shuffle) == (5, True)
        assert wildchat.max_conversations == 15_000
        with pytest.raises(ValueError, match=r"name must be one of wildchat, .* got 'wild'"):
            ConversationFilter.preset("wild")
