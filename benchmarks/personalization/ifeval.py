"""Does IFEval see what online training did? `python -m benchmarks.personalization.ifeval input_data.jsonl`.

Runs `fastsdpo eval --benchmark ifeval` on evenly spaced prompts with the model of `make demo` before and after its
online training, and writes a row for each and one for the difference to benchmarks/results/ifeval_<machine>.json,
with standard errors over prompts. What is in the file is not run again. The prompts are not in this repository:
`fastsdpo eval --help` says where they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks import harness
from benchmarks.personalization.data import mean, standard_error
from fastsdpo.cli import main as fastsdpo
from fastsdpo.online import ifeval

FIGURES = ("prompts", "instructions", "prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")


def measured(prompts: Path, model: Path, limits: tuple[str, ...]) -> harness.Row:
    """What one model reaches.

    Raises:
        SystemExit: the command failed, with its status.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "ifeval.json")
        command = ("eval", str(prompts), "--benchmark", "ifeval", "--model", str(model), *limits, "-o", str(output))
        if status := fastsdpo(list(command)):
            raise SystemExit(status)
        report = json.loads(output.read_text("utf-8"))
    known = {sample.key: sample for sample in ifeval.read_samples(prompts)}
    held, asked, followed = Counter(), Counter(), []
    for key, answer in zip(report["keys"], report["model"]["answers"]):
        verdicts = [loose for _, loose in ifeval.check(known[key], answer)]
        followed.append(int(all(verdicts)))
        for name, loose in zip(known[key].instruction_id_list, verdicts):
            asked[name.partition(":")[0]] += 1
            held[name.partition(":")[0]] += loose
    return {
        **{figure: report["model"][figure] for figure in FIGURES},
        "words": mean([len(text.split()) for text in report["model"]["answers"]]),
        "followed and asked loosely, by kind": {kind: [held[kind], asked[kind]] for kind in sorted(asked)},
        "prompts followed loosely": followed,
        "left_out": report["left_out"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("prompts", type=Path, help="IFEval's input_data.jsonl")
    parser.add_argument("--demo", type=Path, default=Path("demo_output"), metavar="FOLDER", help="what make demo left")
    parser.add_argument("--limit", type=int, default=100, help="prompts, evenly spaced (default: 100)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument("--generation-batch-size", type=int, default=16, metavar="N", help="answers written at once")
    parser.add_argument("--machine", default="cpu", help="names the results file")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, metavar="FOLDER")
    options = parser.parse_args(argv)
    file = options.results / f"ifeval_{options.machine}.json"
    names = ("limit", "max_new_tokens", "dtype", "generation_batch_size")
    case = {"benchmark": "ifeval", **{name: getattr(options, name) for name in names}}
    limits = tuple(word for name in names for word in ("--" + name.replace("_", "-"), str(case[name])))
    run = {**harness.environment(), "command": f"python -m benchmarks.personalization.ifeval {' '.join(limits)}"}
    for name, folder in (("before", options.demo / "base"), ("after", options.demo / "run" / "model")):
        done = [row["case"] for row in harness.read(file)] if file.exists() else []
        if {**case, "model": name} not in done:
            row = {"case": {**case, "model": name}, **measured(options.prompts, folder, limits)}
            harness.record(file, [row], run)
    rows = {row["case"]["model"]: row for row in harness.read(file) if {**case, **row["case"]} == row["case"]}
    before, after = (rows[name]["prompts followed loosely"] for name in ("before", "after"))
    changes = [new - old for old, new in zip(before, after, strict=True)]
    difference = [mean(changes), standard_error(changes)]
    harness.record(file, [{"case": {**case, "model": "after - before"}, "prompt_loose": difference}], run)
    print(f"prompts followed loosely, after - before: {difference[0]:+.1%} (se {difference[1]:.1%}, paired)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
