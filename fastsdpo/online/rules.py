"""Rules of a rule-based user: each checks an answer, and has a sentence with which the user asks for it.

``parse_rule("max_words=20")`` makes a rule from text, for command lines and files.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from fastsdpo.lazy import needed

# A sentence ends at ., ! or ? (with closing quotes or brackets) before white space or the end.
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]+")
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_MARKDOWN = re.compile(r"^\s*(?:#{1,6}\s|[-*•]\s|\d+[.)]\s|```|\|.*\|)|\*\*|__|`", re.MULTILINE)


def words(text: str) -> int:
    """Counts the words, as white space separates them."""
    return len(text.split())


def sentences(text: str) -> int:
    """Counts the sentences. Text after the last full stop counts as one.

    A line break separates too, so that list items and lines of their own count.
    """
    count = 0
    for line in text.splitlines():
        ends = list(_SENTENCE_END.finditer(line))
        rest = line[ends[-1].end() :] if ends else line
        count += len(ends) + bool(re.search(r"\w", rest))
    return count


@dataclass(frozen=True)
class Rule:
    """One wish of a user.

    Attributes:
        name: the text that `parse_rule` takes.
        holds: a function that tells whether an answer fulfils the wish.
        wish: what the user says if the answer does not.
    """

    name: str
    holds: Callable[[str], bool]
    wish: str


def max_words(limit: str) -> Rule:
    n = _number("max_words", limit)
    return Rule(f"max_words={n}", lambda text: 0 < words(text) <= n, f"Please answer in at most {n} words.")


def min_words(limit: str) -> Rule:
    n = _number("min_words", limit)
    return Rule(
        f"min_words={n}", lambda text: words(text) >= n, f"Please answer in more detail, with at least {n} words."
    )


def max_sentences(limit: str) -> Rule:
    n = _number("max_sentences", limit)
    wish = "Please answer in one short sentence." if n == 1 else (f"Please answer in at most {n} sentences.")
    return Rule(f"max_sentences={n}", lambda text: 0 < sentences(text) <= n, wish)


def min_sentences(limit: str) -> Rule:
    n = _number("min_sentences", limit)
    return Rule(f"min_sentences={n}", lambda text: sentences(text) >= n, f"Please answer in at least {n} sentences.")


def forbid(listed: str) -> Rule:
    chosen = [word for word in listed.split("|") if word.strip()]
    if not chosen:
        raise ValueError("forbid must name words, separated by |")
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(w)}(?!\w)" for w in chosen), re.IGNORECASE)
    return Rule(
        f"forbid={listed}", lambda text: pattern.search(text) is None, f"Please do not use {_listing(chosen)}."
    )


def require(listed: str) -> Rule:
    chosen = [word for word in listed.split("|") if word.strip()]
    if not chosen:
        raise ValueError("require must name words, separated by |")
    lower = [word.lower() for word in chosen]
    return Rule(
        f"require={listed}",
        lambda text: all(word in text.lower() for word in lower),
        f"Please mention {_listing(chosen)}.",
    )


def starts_with(start: str) -> Rule:
    if not start.strip():
        raise ValueError("starts_with must be some text")
    return Rule(
        f"starts_with={start}",
        lambda text: text.lstrip().startswith(start),
        f'Please begin your answer with "{start}".',
    )


def regex(pattern: str) -> Rule:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"regex must be a regular expression: {error}") from error
    return Rule(
        f"regex={pattern}", lambda text: compiled.search(text) is not None, f"Please follow this pattern: {pattern}"
    )


def case(kind: str) -> Rule:
    checks = {"lower": str.islower, "upper": str.isupper}
    if kind not in checks:
        raise ValueError(f"case must be lower or upper, got {kind!r}")
    return Rule(f"case={kind}", checks[kind], f"Please write everything in {kind} case.")


def form(kind: str) -> Rule:
    """The answer has a format: json, list, or plain (no Markdown)."""
    checks: dict[str, tuple[Callable[[str], bool], str]] = {
        "json": (_is_json, "Please answer in valid JSON only."),
        "list": (lambda text: len(_LIST_ITEM.findall(text)) >= 2, "Please answer with a list."),
        "plain": (
            lambda text: bool(text.strip()) and _MARKDOWN.search(text) is None,
            "Please answer in plain text, without lists or Markdown.",
        ),
    }
    if kind not in checks:
        raise ValueError(f"format must be one of {', '.join(checks)}, got {kind!r}")
    holds, wish = checks[kind]
    return Rule(f"format={kind}", holds, wish)


LANGUAGES = {
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "zh-cn": "Chinese",
}


def language(code: str) -> Rule:
    """The answer is in a language (such as "de"). The package langdetect detects it, with a fixed seed."""
    with needed("langdetect", "the rule language", "'fastsdpo[online]'"):
        import langdetect
    known = langdetect.detector_factory.PROFILES_DIRECTORY
    import os

    if not os.path.exists(os.path.join(known, code)):
        raise ValueError(f"language must be a code that langdetect knows (en, de, ...), got {code!r}")

    def holds(text: str) -> bool:
        langdetect.DetectorFactory.seed = 0
        try:
            return langdetect.detect(text) == code
        except langdetect.LangDetectException:  # no letters
            return False

    return Rule(f"language={code}", holds, f"Please answer in {LANGUAGES.get(code, code)}.")


RULES: dict[str, Callable[[str], Rule]] = {
    "max_words": max_words,
    "min_words": min_words,
    "max_sentences": max_sentences,
    "min_sentences": min_sentences,
    "forbid": forbid,
    "require": require,
    "starts_with": starts_with,
    "regex": regex,
    "case": case,
    "format": form,
    "language": language,
}


EXAMPLES = (
    "max_words=20",
    "min_words=50",
    "max_sentences=1",
    "min_sentences=3",
    "forbid=very|really",
    "require=source",
    "starts_with=Answer:",
    "regex=^Yes|^No",
    "case=lower",
    "format=json",
    "format=list",
    "format=plain",
    "language=de",
)


def describe() -> str:
    """Lists an example of each rule, one a line, with the sentence that its user would say."""
    lines = []
    for example in EXAMPLES:
        try:
            lines.append(f"{example:20} {parse_rule(example).wish}")
        except ImportError as error:
            lines.append(f"{example:20} ({error})")
    return "\n".join(lines)


def parse_rule(text: str) -> Rule:
    """Makes a rule from ``name=value``; the names are the keys of `RULES`.

    Raises:
        ValueError: there is no such rule, or the value does not fit it; the text says which.
        ImportError: the rule needs a package that is missing.
    """
    name, equals, value = text.partition("=")
    if not equals or name not in RULES:
        close = difflib.get_close_matches(name, RULES, n=1)
        meant = f"; did you mean {close[0]!r}?" if close and equals else ""
        raise ValueError(f"a rule must be NAME=VALUE with a name of {', '.join(RULES)}, got {text!r}{meant}")
    try:
        return RULES[name](value)
    except ValueError as error:
        raise ValueError(f"rule {text!r}: {error}") from error


def _number(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a number of at least 1, got {text!r}")
    return number


def _listing(chosen: list[str]) -> str:
    quoted = [f'"{word}"' for word in chosen]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
