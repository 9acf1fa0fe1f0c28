"""What every benchmark shares: its arguments, its rivals' rows, and its results file.

A results file is ``<folder>/<theme>_<machine>.json``, for example ``logits_avx2.json``:

    {"runs": [{"device", "native", "python", "versions", "commit", "command", "date"}, ...],
     "rows": [{"case": {...}, "rivals": {name: {"median", "fastest", "slowest", "cpu", "peak_bytes"}},
               "run": index into "runs", ...}, ...]}

Seconds and bytes. A row is measured with all its rivals in turns, so its ratios hold. A new run replaces the
rows of the cases that it measured and keeps the others: a long benchmark can be taken in parts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsdpo import timing
from fastsdpo.timing import interleave

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def commit() -> str:
    """The commit of the checkout, and whether the measured code has changes that are not in it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        paths = ["kernels", "fastsdpo", "benchmarks", ":(exclude)benchmarks/results"]
        dirty = subprocess.run([*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + (" and uncommitted changes" if dirty.stdout else "")


def environment(device: str = "cpu") -> Row:
    """Device, versions, commit, command and date of this run."""
    return {**timing.environment(device), "commit": commit()}


class Arguments(argparse.ArgumentParser):
    """Arguments of every benchmark; a script adds its sizes with `size`, whose second value is for --quick."""

    def __init__(self, module_doc: str | None, *, rounds: int = 3, seconds: float = 0.0):
        super().__init__(description=str(module_doc).splitlines()[0])
        self.sizes: dict[str, tuple[Any, Any]] = {"rounds": (rounds, 1), "seconds": (seconds, 0.0)}
        self.add_argument("--quick", action="store_true", help="tiny sizes, seconds: does it work?")
        self.add_argument("--rounds", type=int, help=f"at least so many runs of each rival (default: {rounds})")
        self.add_argument(
            "--seconds", type=float, help=f"more rounds while these have not passed (default: {seconds:g})"
        )
        self.add_argument("--without", nargs="+", default=[], metavar="RIVAL", help="rivals to leave out")
        self.add_argument("--machine", default="cpu", help="names the results file (default: cpu)")
        self.add_argument("--output", type=Path, default=Path("bench_output"), metavar="FOLDER")
        self.add_argument(
            "--record", action="store_const", dest="output", const=RESULTS, help="write to benchmarks/results"
        )

    def size(self, name: str, full: Any, quick: Any, kind: Callable[[str], Any] = int, **options: Any) -> None:
        """Adds an argument with one default for a full run and one for a quick run."""
        self.sizes[name.replace("-", "_")] = (full, quick)
        options["help"] = f"{options.get('help', '')} (default: {full})".strip()
        self.add_argument(f"--{name}", type=kind, **options)

    def model_sizes(self) -> None:
        """The sizes of a batch and of a small Llama; `size_of` gives those that name a case."""
        sizes = {"sequences": (4, 2), "prompt": (32, 4), "completion": (128, 8)}
        for name, both in {**sizes, "vocabulary": (49152, 2048), "hidden": (576, 72), "layers": (2, 1)}.items():
            self.size(name, *both)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        found = super().parse_args(*arguments)
        for name, (full, quick) in self.sizes.items():
            if getattr(found, name) is None:
                setattr(found, name, quick if found.quick else full)
        return found


def size_of(args: argparse.Namespace) -> Row:
    return {"tokens": args.sequences * args.completion, "vocabulary": args.vocabulary, "hidden": args.hidden}


def in_child(module: str, *arguments: str) -> Any:
    """What a benchmark in a process of its own prints last, which is JSON."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


# ------------------------------------------------------------------------------------- results files


def results_file(theme: str, args: argparse.Namespace) -> Path:
    return args.output / f"{theme}_{args.machine}.json"


def read(path: Path) -> list[Row]:
    """The rows of a results file; ``row["run"]`` is the environment itself."""
    data = json.loads(path.read_text("utf-8"))
    return [{**row, "run": data["runs"][row["run"]]} for row in data["rows"]]


def rounded(value: Any) -> Any:
    """Floats to 5 digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as `read` gives them, one a line, each environment once."""
    runs: list[Row] = []
    lines = []
    for row in rows:
        if row["run"] not in runs:
            runs.append(row["run"])
        lines.append(json.dumps({**rounded(row), "run": runs.index(row["run"])}, ensure_ascii=False))
    about = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"runs": [\n' + about + '\n],\n"rows": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")


def record(path: Path, rows: Iterable[Row], run: Row | None = None) -> None:
    """Adds rows to a results file in place of those of the same cases."""
    run = run or environment()
    new = {json.dumps(row["case"]): {**row, "run": run} for row in rows}
    old = {json.dumps(row["case"]): row for row in (read(path) if path.exists() else [])}
    write(path, {**old, **new}.values())


# ------------------------------------------------------------------------------------------ measuring


def tell(row: Row, base: str) -> None:
    """Prints a row's medians and their ratios to the base's."""
    case = " ".join(f"{value}" for value in row["case"].values())
    ours = row["rivals"][base]["median"]
    said = [
        f"{who} {found['median']:.3g} s ({found['median'] / ours:.2f}x, {(found['peak_bytes'] or 0) >> 20} MiB)"
        for who, found in row["rivals"].items()
    ]
    print(f"{case}: " + ", ".join(said), flush=True)
    for who, reason in row.get("left_out", {}).items():
        print(f"  {who} left out: {reason}", flush=True)


def compare(
    case: Row,
    runs: dict[str, Callable[[], Any]],
    args: argparse.Namespace,
    *,
    prepare: Callable[[], object] = lambda: None,
    same: Callable[[Any, Any], bool] | None = None,
    **extra: Any,
) -> Row:
    """A row of functions that must all return what the first does, and that are then timed in turns.

    Args:
        same: compares two results; default: equal tensors within 1e-4. A run that differs ends the program.
    """
    want: Any = None
    for name, run in runs.items():
        prepare()
        got = run()
        want = got if want is None else want
        if not (same or close)(got, want):
            raise SystemExit(f"{case}: {name} gives something else")
    timings = interleave(
        {name: run for name, run in runs.items() if name not in args.without},
        args.rounds,
        prepare=prepare,
        least_seconds=args.seconds,
    )
    row = {"case": case, "rivals": {name: found._asdict() for name, found in timings.items()}, **extra}
    tell(row, next(iter(row["rivals"])))
    return row


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- pages


def with_tables(text: str, names: str, table: Callable[[str], str]) -> str:
    """A page with its tables made anew.

    Args:
        names: a pattern; a table stands between ``<!-- NAME -->`` and ``<!-- end -->``.
        table: the text of a table by its name.
    """

    def made(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{table(found[1])}\n<!-- end -->\n"

    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- end -->\n", made, text, flags=re.DOTALL)


def keep_page(page: Path, text: str, check: bool) -> int:
    """Writes a page; with ``check`` writes nothing, and the exit status is 1 where the page is not this text."""
    if check:
        same = page.exists() and page.read_text("utf-8") == text
        print(f"{page.name} is {'what' if same else 'not what'} the results files say")
        return int(not same)
    page.write_text(text, "utf-8")
    print(f"wrote {page.relative_to(ROOT)}")
    return 0


def junit(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Module, name, "passed", "skipped" or "failed", and the end of its report, of each test of a JUnit XML file."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        text = "" if problem is None else f"{problem.get('message', '')}\n{problem.text or ''}"
        state = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        yield str(case.get("classname")), str(case.get("name")), state, text[-3000:]


def read_junit(path: Path) -> dict[str, Any]:
    """``{"passed", "skipped", "failed": {test: end of its report}}``."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for module, name, state, text in junit(path):
        if state == "failed":
            found["failed"][f"{module}::{name}"] = text
        else:
            found[state] += 1
    return found
