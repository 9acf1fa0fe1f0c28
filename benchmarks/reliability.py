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
MARKED = re.compile(r"<!-- (rows: (?P<pattern>.*?)|sums|versions) -->\n.*?<!-- end -->\n", re.DOTALL)


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

    def fill(found: re.Match[str]) -> str:
        if found["pattern"] is not None:
            made = table({name: row for name, row in rows.items() if re.search(found["pattern"], name)})
        elif found[1] == "sums":
            made = ", ".join(f"{sum(row[key] for row in rows.values()):,} {key}" for key in COUNTS) + ".\n"
        else:
            made = compatibility.table(versions)
        return f"<!-- {found[1]} -->\n\n{made}\n<!-- end -->\n"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    old = PAGE.read_text("utf-8")
    new = page(old)
    if parser.parse_args(argv).check:
        return int(old != new)
    PAGE.write_text(new, "utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
