"""A number with a unit in README or docs names a results file, and stands in it: as it is or as a ratio.

docs/performance.md and the tables of docs/reliability.md are made from the files (tests/benchmarks/test_report.py).
"""

import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import compare, harness

ROOT = Path(__file__).parents[1]
MADE = {ROOT / "docs" / name for name in ("performance.md", "reliability.md")}
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p not in MADE]
FIGURE = re.compile(r"(?<![\w./-])(\d[\d,]*(?:\.\d+)?)(?:x\b|%|\s?(?:[KMGT]i?B(?:/s)?|[GT]FLOP|ms|\w+/s)\b)(?!-)")
FILE = re.compile(r"`(?:benchmarks/results/)?([a-z]\w*\.json)`")
# A figure that is no measurement, by the words around it.
NONE = ("under 15 minutes on two cores",)


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    if isinstance(value, str):
        return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", value)]
    return [float(value)] if isinstance(value, (int, float)) else []


def figures(name):
    """What a page may take from a file: its numbers, percentages, MiB and ratios."""
    data = json.loads((harness.RESULTS / name).read_text("utf-8"))
    found = numbers(data)
    if "runs" in data and "rows" in data:
        ratios = compare.ratios(harness.read(harness.RESULTS / name)).values()
        found += [*ratios, *(1 / value for value in ratios)]
    return [*found, *(100 * value for value in found), *(value / 2**20 for value in found)]


def blocks(text):
    """Each table row, list item and paragraph, with the files that it names, or the row or the section above."""
    for section in re.split(r"^#+ ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE):
        row: list[str] = []
        section_files: list[str] = []
        for block in re.split(r"\n\s*\n|\n(?=\||[-*] |\d+\. )", section):
            named = FILE.findall(block)
            section_files += named
            row = named or row
            yield block, row if block.startswith("|") and row else section_files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_figure_is_in_the_file_it_names(page):
    for block, files in blocks(page.read_text("utf-8")):
        words = " ".join(block.split())
        for match in FIGURE.finditer(words):
            if any(none in words for none in NONE):
                continue
            figure = match[1].replace(",", "")
            digits = len(figure.partition(".")[2])
            known = itertools.chain.from_iterable(map(figures, files))
            assert any(f"{abs(n):.{digits}f}" == figure for n in known), f"{match[0]!r} of {words[:99]!r}: {files}"
