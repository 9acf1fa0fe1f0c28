"""Wishes, and users whose follow-up depends on the answer: a complaint where it breaks the wish, else nothing."""

from __future__ import annotations

import random
from typing import Any

from fastsdpo.online import RuleUser

Messages = list[dict]

# name -> (rules, what the user says where one is broken)
WISHES: dict[str, tuple[list[str], str]] = {
    "short": (["max_sentences=1", "max_words=25"], "That is too long. Please answer in one short sentence."),
    "list": ([r"regex=^\s*1[.)] [\s\S]*^\s*2[.)] "], "I wanted a numbered list of steps."),
    "yes or no": (["regex=^(Yes|No)\\b"], "Please start your answer with Yes or No."),
    "long": (["min_words=26"], "That is too short. Please answer in detail, in several sentences."),
    "bullets": (["format=list"], "Please answer with a bullet list."),
    "you": ([r"regex=(?i)\byou\b"], "Please address me directly as you."),
    "no I": (["forbid=I"], "Do not talk about yourself. Do not use the word I."),
    "lower case": (["case=lower"], "Please write in lower case only."),
    "enthusiastic": (["regex=!"], "Be more enthusiastic!"),
    "closing question": ([r"regex=\?\s*\Z"], "Please end your answer with a question to me."),
    "example": ([r"regex=(?i)\bfor example|for instance|e\.g\."], "Please give me an example."),
    "plain": (["format=plain"], "Please write plain text, without lists or Markdown."),
}


def user_of(wish: str) -> RuleUser:
    """Complains where its one wish is broken, and says nothing where it is fulfilled."""
    rules, complaint = WISHES[wish]
    return RuleUser(rules, wish=complaint)


class KindUser:
    """Another wish for questions of another kind: steps where it is asked how, else one short sentence.

    Args:
        shuffled: a control; the complaints of a batch go to answers that they are not about.
    """

    def __init__(self, *, shuffled: bool = False):
        self.how, self.other = user_of("list"), user_of("short")
        self.shuffled = random.Random(1) if shuffled else None

    def of(self, prompt: Messages) -> RuleUser:
        return self.how if is_how(prompt[-1]["content"]) else self.other

    def satisfied(self, prompts: list[Messages], responses: list[str]) -> list[bool]:
        return [self.of(p).satisfied([p], [r])[0] for p, r in zip(prompts, responses)]

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        said = [self.of(p).feedback([p], [r])[0] for p, r in zip(prompts, responses)]
        if self.shuffled is not None:
            about = [index for index, text in enumerate(said) if text]
            texts = [said[index] for index in about]
            self.shuffled.shuffle(texts)
            for index, text in zip(about, texts):
                said[index] = text
        return said


def is_how(question: str) -> bool:
    return question.lower().startswith(("how ", "can you tell me how", "please tell me how"))


class SatisfiedByRule:
    """A user played by a language model, whose satisfaction a rule counts."""

    def __init__(self, user: Any, wish: str):
        self.user, self.rule = user, user_of(wish)

    def satisfied(self, prompts: list[Messages], responses: list[str]) -> list[bool]:
        return self.rule.satisfied(prompts, responses)

    def feedback(self, prompts: list[Messages], responses: list[str]) -> list[str]:
        return self.user.feedback(prompts, responses)
