"""Every measured figure in the documents names a file in benchmarks/results, and stands in it.

A figure is a number with a unit of measurement (``4.8x``, ``80%``, ``234 MiB``, ``1.3 s``, ``GB/s``, ...).
Its file is one that is named where it stands: in its table row ("the same" is the row above), its paragraph
or list item, or else in the text of its section, above it. The number must occur in that file or, rounded as
it is printed, be one that does. docs/performance.md is made from the files (tests/benchmarks/test_report.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if page != ROOT / "docs" / "performance.md"
]
UNIT = (
    r"x\b|%|\s?(?:KiB|MiB|GiB|kB|MB|GB|TB)(?:/s)?\b|\s?[GT]FLOP(?:/s|S)?\b"
    r"|\s?(?:ms|s|us|minutes|seconds|tokens/s|interactions/s)\b"
)
FIGURE = re.compile(rf"(?<![\w./-])(\d[\d,]*(?:\.\d+)?)(?:{UNIT})(?![\w=])")
FILE = re.compile(r"`(?:benchmarks/results/)?([a-z]\w*(?:_\d{4}-\d\d-\d\d)?\.(?:md|json))`")

# What looks like a measurement and is none: (page, words around the figure, why).
EXCEPTIONS: list[tuple[str, str, str]] = [
    ("docs/online.md", "from under 20% to over 80% within", "the goal"),
    ("CONTRIBUTING.md", "under 15 minutes on two cores", "the suite's limit"),
    ("CONTRIBUTING.md", "about 20 seconds", "from where a test is slow"),
]


def blocks(text: str) -> list[tuple[str, str]]:
    """(section's text above, block) of every table row, list item and paragraph outside code."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = []
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        above = ""
        for paragraph in re.split(r"\n\s*\n", section):
            pieces = re.split(r"\n(?=\||[-*] |\d+\. )", paragraph)
            for piece in pieces:
                found.append((above, piece))
                above += piece + "\n"
    return found


def files_of(above: str, block: str) -> list[Path]:
    """The results files that a block's figures may be from."""
    named = FILE.findall(block)
    if not named and re.search(r"\|\s*the same\s*\|\s*$", block.strip()):
        rows = [line for line in above.splitlines() if line.startswith("|")]
        named = next((FILE.findall(row) for row in reversed(rows) if FILE.findall(row)), [])
    named = named or FILE.findall(above)
    return [path for name in named if (path := RESULTS / name).exists()]


def numbers_of(path: Path) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", path.read_text("utf-8").replace(",", "")))


def stands_in(figure: str, path: Path) -> bool:
    """Whether the file has the number, or one that is printed so at this precision."""
    figure = figure.replace(",", "")
    decimals = len(figure.partition(".")[2])
    numbers = numbers_of(path)
    return figure in numbers or any(
        f"{float(number):.{decimals}f}" == figure for number in numbers if len(number.partition(".")[2]) > decimals
    )


def problems(page: Path, text: str) -> list[str]:
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    found = []
    for above, block in blocks(text):
        allowed = [words for where, words, _ in EXCEPTIONS if where == name]
        searched = " ".join(block.split())
        for words in allowed:
            searched = searched.replace(words, "")
        for match in FIGURE.finditer(searched):
            files = files_of(above, block)
            if not files:
                found.append(f"{name}: {match.group()!r} names no results file: {searched[:90]}")
            elif not any(stands_in(match.group(1), path) for path in files):
                names = ", ".join(path.name for path in files)
                found.append(f"{name}: {match.group()!r} is not in {names}: {searched[:90]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_figure_is_in_the_file_it_names(page):
    found = problems(page, page.read_text("utf-8"))
    assert not found, "\n".join(found)


def test_exceptions_are_still_there():
    for name, words, reason in EXCEPTIONS:
        assert words in " ".join((ROOT / name).read_text("utf-8").split()), (name, words)
        assert reason


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "loss_cpu_2026-01-01.md").write_text("| TRL | 4.78 | 234 | 1,916 |\n")
    (tmp_path / "other_cpu_2026-01-01.md").write_text("| 9.9 |\n")
    monkeypatch.setitem(globals(), "RESULTS", tmp_path)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("It takes 4.8x less (`loss_cpu_2026-01-01.md`).", 0),
        ("It takes 4.78x less (`loss_cpu_2026-01-01.md`).", 0),
        ("It takes 4.7x less (`loss_cpu_2026-01-01.md`).", 1),
        ("It takes 4.784x less (`loss_cpu_2026-01-01.md`).", 1),
        ("It takes 4.8x less.", 1),
        ("See `loss_cpu_2026-01-01.md`.\n\nIt takes 4.8x less.", 0),
        ("See `loss_cpu_2026-01-01.md`.\n\n## Another section\n\nIt takes 4.8x less.", 1),
        ("| a | 4.8x | `loss_cpu_2026-01-01.md` |\n| b | 234 MiB | the same |", 0),
        ("| a | 4.8x | `loss_cpu_2026-01-01.md` |\n| b | 235 MiB | the same |", 1),
        ("| a | 9.9x | `loss_cpu_2026-01-01.md` |\n| b | 9.9x | `other_cpu_2026-01-01.md` |", 1),
        (
            "| a | 4.8x | `loss_cpu_2026-01-01.md` |\n| b | 4.8x | `other_cpu_2026-01-01.md` |\n"
            "| c | 9.9x | the same |",
            1,
        ),
        ("1,916 tokens/s (`loss_cpu_2026-01-01.md`), or 80% (`loss_cpu_2026-01-01.md`)", 1),
        ("`loss_cpu_2027-01-01.md` is missing: 4.8x", 1),
        ("```\n4.8x in code\n```\nand 512 x 49152, SmolLM2-135M, 2 cores", 0),
    ],
)
def test_the_check_itself(text, wrong, results):
    assert len(problems(Path("page.md"), text)) == wrong
