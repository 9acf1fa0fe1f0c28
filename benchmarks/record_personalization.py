"""Results files from a finished `make personalization`.

    make personalization SEEDS="1 2 3"
    python -m benchmarks.record_personalization personalization

Writes personalization_cpu_<date>.json (every point), .md (the table) and .png, and the sample answers
of every point to personalization_answers_cpu_<date>.md, all in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from benchmarks import harness
from fastsdpo.online import experiment

PAGE = """# Online: a user's wish learned, on a CPU

SmolLM2-135M-Instruct and users that follow rules: `short` wants one short sentence (at most 25 words),
`flip` the same and after half of its interactions long answers instead (at least 26 words), `unrelated`
says things that have nothing to do with the answers. {questions} held-out questions, greedy answers.
Perplexity: change on {ordinary} ordinary conversations as they are (their first 384 tokens); beside it
that of {brief} brief exchanges, answers of 100 to 500 characters, which a wish for short answers is
nearest to.

Recipe: `{recipe}`; for `flip` with `{flip}`. Sample answers of every point: `{answers}`.

![satisfaction, length and perplexity]({png})
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path, help="what make personalization wrote")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, metavar="FOLDER")
    parser.add_argument("--command", default='make personalization SEEDS="1 2 3"')
    options = parser.parse_args(argv)
    runs = experiment.read_points(options.folder)
    if not runs:
        parser.error(f"{options.folder} holds no runs")
    data = json.loads((options.folder / "data.json").read_text("utf-8"))
    name = f"personalization_cpu_{datetime.date.today()}"
    answers = f"personalization_answers_cpu_{datetime.date.today()}.md"
    environment = {**harness.environment(), "command": options.command}
    stored = {
        "environment": environment,
        "recipe": experiment.RECIPE,
        "changes": experiment.CHANGES,
        "runs": [
            {"condition": condition, "seed": seed, "points": points} for (condition, seed), points in runs.items()
        ],
    }
    counts = {key: len(data[key]) for key in ("ordinary", "brief")}
    page = PAGE.format(
        questions=len(data["held_out"]),
        recipe=json.dumps(experiment.RECIPE),
        flip=json.dumps(experiment.CHANGES["flip"]),
        answers=answers,
        png=f"{name}.png",
        **counts,
    )
    lines = [page, *experiment.table(runs), "", "## Command", "", f"- `{options.command}`"]
    lines += [f"- {key}: {value}" for key, value in environment.items() if key != "command"]
    samples = ["# Online: sample answers of every point", "", *experiment.answers(runs)]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / name
    path.with_suffix(".json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    (options.results / answers).write_text("\n".join(samples).rstrip() + "\n", "utf-8")
    experiment.plot(runs, path.with_suffix(".png"))
    print(f"wrote {path}.{{json,md,png}} and {answers}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
