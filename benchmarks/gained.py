"""The tables "What is gained" of docs/integrations, from the results files.

    python -m benchmarks.gained            writes them; a test fails where a page is not what the files say

A table stands between ``<!-- gained: THEME KEY=VALUE -->``, which names the results files and the rows of them, and
``<!-- end -->``. Time and peak memory are parts of the first rival's. Where there is no row yet, the command stands
there in place of a table.
"""

from __future__ import annotations

import re

from benchmarks import harness
from fastsdpo.timing import markdown_table

PAGES = sorted((harness.ROOT / "docs" / "integrations").glob("*.md"))
MARKED = re.compile(r"(<!-- gained: (\w+) ?([^>]*?) ?-->\n).*?(<!-- end -->)", re.DOTALL)
# What a row is called: these parts of its case. The command that measures it.
NAMES = {"distillation_trainers": ("trainer", "mode"), "peers": ("loss",), "verl": ("loss",)}
COMMANDS = {
    "distillation_trainers": "python -m benchmarks.bench_trl --trainers GKD GOLD Distillation SDFT ...",
    "peers": "PYTHONPATH=build/peers/{peer} python -m benchmarks.bench_peers --peer {peer}",
    "verl": "python -m benchmarks.bench_verl",
}


def table(theme: str, wanted: dict[str, str]) -> str:
    parts = []
    for path in sorted(harness.RESULTS.glob(f"{theme}_*.json")):
        rows = [
            row for row in harness.read(path) if all(str(row["case"].get(key)) == text for key, text in wanted.items())
        ]
        if not rows:
            continue
        base = next(iter(rows[0]["rivals"]))
        others = list(dict.fromkeys(name for row in rows for name in row["rivals"] if name != base))
        header = ["loss", *(f"time, {name}" for name in others), *(f"memory, {name}" for name in others)]
        lines = []
        for row in rows:
            cells = [", ".join(str(row["case"][part]) for part in NAMES[theme])]
            for kind in ("median", "peak_bytes"):
                for name in others:
                    found = row["rivals"].get(name)
                    whole = row["rivals"][base][kind]
                    cells.append(f"{found[kind] / whole:.2f}" if found and whole and found[kind] else "")
            lines.append(cells)
        case = rows[0]["case"]
        size = f"{case['tokens']} tokens that count, vocabulary {case['vocabulary']}, width {case['hidden']}"
        name = path.relative_to(harness.ROOT)
        parts.append(f"As parts of {base}'s; {size}; from\n`{name}`.\n\n{markdown_table(header, lines)}")
    command = COMMANDS[theme].format(**wanted)
    return "\n".join(parts) or f"Not measured yet: `{command}` measures time and peak memory.\n"


def page(text: str) -> str:
    def written(match: re.Match[str]) -> str:
        wanted = dict(part.split("=") for part in match[3].split())
        return f"{match[1]}{table(match[2], wanted)}{match[4]}"

    return MARKED.sub(written, text)


def main() -> None:
    for path in PAGES:
        path.write_text(page(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
