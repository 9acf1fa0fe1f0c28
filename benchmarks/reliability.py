"""Writes the tables of docs/reliability.md from the results of `make fuzz`, `make soak` and `make compatibility`.

python -m benchmarks.reliability           writes
python -m benchmarks.reliability --check   exit status 1 where the page is not what the files say

The page's text is written by hand; a table stands between ``<!-- rows: PATTERN -->`` (the rows whose names match),
``<!-- sums -->`` or ``<!-- versions -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from benchmarks import compatibility, harness
from fastsdpo.timing import markdown_table

PAGE = harness.ROOT / "docs" / "reliability.md"
COUNTS = ("tried", "faults", "survived", "lost")


def read() -> dict[str, harness.Row]:
    """What was tried, by name."""
    return json.loads((harness.RESULTS / "reliability_cpu.json").read_text("utf-8"))["rows"]


def table(rows: dict[str, harness.Row]) -> str:
    lines = [[name, *(f"{row[key]:,}" for key in COUNTS)] for name, row in sorted(rows.items())]
    text = markdown_table(["case", *COUNTS], lines)
    for name, row in sorted(rows.items()):
        if row["figures"]:
            listed = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in row["figures"].items())
            text += f"\n{name}: {listed}.\n"
    return text


def page(text: str) -> str:
    """The page with its tables made anew."""
    rows = read()
    versions = json.loads((harness.RESULTS / "compatibility_cpu.json").read_text("utf-8"))["rows"]

    def made(name: str) -> str:
        if name.startswith("rows: "):
            return table({key: row for key, row in rows.items() if re.search(name.removeprefix("rows: "), key)})
        if name == "sums":
            return ", ".join(f"{sum(row[key] for row in rows.values()):,} {key}" for key in COUNTS) + ".\n"
        return compatibility.table(versions)

    return harness.with_tables(text, "rows: .*?|sums|versions", made)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    return harness.keep_page(PAGE, page(PAGE.read_text("utf-8")), check)


if __name__ == "__main__":
    sys.exit(main())
