"""Which model types share prefixes: a tiny random model of every causal-LM type of the installed transformers.

    python -m benchmarks.coverage                       # all types: a results file, and the page docs/models.md
    python -m benchmarks.coverage --types qwen3_5_text  # some, and print what is found

Each type is built with small sizes and random weights. Then come the checks that training starts with
(`check_head`, `check_passes`, `check_sharing`), and a comparison in float64 with separate calls of the whole
model: log-probabilities of student and teacher, and the gradient of every parameter, on plans with nested
histories, branches of one token, and prompts shorter than a convolution.

    shared     prefixes are computed once, with the values and gradients of separate passes
    unshared   training runs every sequence alone, with the values and gradients of separate passes
    refused    training stops before it starts, and says why
    not built  no tiny model: transformers refuses the small configuration, or the model needs more than text
    WRONG      a value is wrong, or an error comes up in training: there must be none
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness, tiny
from fastsdpo.prefix import check_head, check_passes, check_sharing, head_parameters, no_grad_pass, shared_forward

PAGE = harness.ROOT / "docs" / "models.md"
TOLERANCE = 1e-7  # relative; what is wrong is off by 1e-2 and more
SECONDS = 120  # of CPU time, for one type


class Item(NamedTuple):
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]


def plans() -> dict[str, list[Item]]:
    draw = random.Random(0)

    def text(length: int) -> list[int]:
        return [draw.randrange(5, 250) for _ in range(length)]

    x, y1, o1, y2, o2, y3 = (text(n) for n in (24, 12, 9, 30, 7, 40))
    second, third = x + y1 + o1, x + y1 + o1 + y2 + o2
    nested = [
        Item(x, x + text(5) + o1 + text(3), y1),
        Item(second, second[:-2] + text(4) + o2 + text(2), y2),
        Item(third, third + text(20), y3),
    ]
    short = [
        Item(text(1), text(2), text(5)),
        Item([5], [5, 6], [7, 8, 9]),
        Item([5, 6], [5, 6, 7], [9]),
        Item([5, 6, 7], [5, 6, 7], [9, 9]),
    ]
    single = [
        Item(x, [*x, 7], [8]),
        Item(x, [*x, 7], [8, 9]),
        Item(x, [*x, 7, 6], [8, 9]),
        Item([*x, 8], [*x, 8, 6], [9, 5]),
        Item([*x, 8, 9], [*x, 8, 9, 7, 7], [5, 6, 7]),
    ]
    return {"nested": nested, "short": short, "single": single}


class Passes(NamedTuple):
    student: Tensor
    teacher: Tensor
    gradients: dict[str, Tensor]


def separate(model: nn.Module, items: list[Item]) -> Passes:
    """By calls of the whole model, one sequence each."""

    def logps(prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        logits = tiny.call(model, ids).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]

    student = torch.cat([logps(i.prompt_ids, i.completion_ids) for i in items])
    with no_grad_pass():
        teacher = torch.cat([logps(i.teacher_prompt_ids, i.completion_ids) for i in items])
    return _with_gradients(model, student, teacher)


def by_shared_forward(model: nn.Module, items: list[Item], sharing: Any) -> Passes:
    states = shared_forward(model, items, sharing=sharing)
    head = head_parameters(model)

    def logps(hidden: Tensor) -> Tensor:
        z = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return z.log_softmax(-1).gather(-1, states.target_ids[:, None])[:, 0]

    with torch.no_grad():
        teacher = logps(states.teacher_hidden)
    return _with_gradients(model, logps(states.student_hidden), teacher)


def _with_gradients(model: nn.Module, student: Tensor, teacher: Tensor) -> Passes:
    model.zero_grad(set_to_none=True)
    (student * torch.linspace(0.2, 1.0, len(student), dtype=student.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Passes(student.detach(), teacher, gradients)


def difference(want: Passes, got: Passes) -> float:
    """The largest of the relative differences: log-probabilities of both sides, and each gradient.

    A gradient below 1e-6 of the largest is compared with that: it is the rounding of others.
    """
    found = [(w - g).norm() / w.norm() for w, g in zip(want[:2], got[:2])]
    scale = max(g.norm() for g in want.gradients.values())
    for name in want.gradients.keys() | got.gradients.keys():
        zero = torch.zeros(())
        w, g = (passes.gradients.get(name, zero) for passes in (want, got))
        found.append((w - g).norm() / w.norm().clamp(min=1e-6 * scale))
    return float(torch.stack([error.double() for error in found]).nan_to_num(nan=torch.inf).max())


# ------------------------------------------------------------------------------------------- one model type


class Found(NamedTuple):
    verdict: str
    why: str
    difference: float | None


def examine(model_type: str) -> Found:
    try:
        model = tiny.build(model_type)
        items = plans()
        separate(model, items["short"])  # transformers itself runs it on text
    except Exception as error:
        return Found("not built", _one_line(error), None)
    try:
        for check in (check_head, check_passes):
            good, why = check(model)
            if not good:
                return Found("refused", why, None)
        good, why = check_sharing(model)
        with tiny.in_float64():
            model = model.double()
            errors = [
                difference(separate(model, part), by_shared_forward(model, part, sharing))
                for part in items.values()
                for sharing in (("conversation", "interaction") if good else ("off",))
            ]
    except TimeoutError:
        raise
    except Exception as error:
        return Found("WRONG", _one_line(error), None)
    if max(errors) > TOLERANCE:
        return Found("WRONG", f"differs from separate passes; {why}", max(errors))
    return Found("shared" if good else "unshared", why, max(errors))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("it takes too long")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# ------------------------------------------------------------------------------------------------- the page

SHARED = """Values and gradients equal those of separate passes. In three ways:

- Attention through transformers' interface, and recurrent layers with states in a cache: a token is computed once.
- Attention of a model's own (Bloom, MPT, Falcon, GPT-J, CodeGen, StableLM, Nemotron, Doge, HRM ...; all
  models with an indexer, such as DeepSeek V3.2 and GLM-5): so too, with a mask of queries x keys for the pack. Such
  models form all scores anyway, but these grow with the square of a pack: keep `max_tokens_per_pack` small. Doge
  shares up to `keep_window_size` tokens, and runs longer sequences alone.
- Layers that go on from no state (MiniMax's and Zamba's linear layers, RecurrentGemma's, the attention of Zaya and
  of DeepSeek V4): they run along whole sequences, and everything else is computed once."""

HEADINGS = {
    "WRONG": ("Wrong", "These give wrong values or stop with an error in training."),
    "shared": ("Share prefixes", SHARED),
    "unshared": ("Run unshared", "Every sequence runs alone, with right values. The trainer says so when it starts."),
    "refused": ("Refused", "The trainer stops before it starts, and says why."),
    "not built": ("Not built", "No tiny model could be built or run on text alone. So nothing is known of these."),
}


# Causal-LM classes of transformers that nobody trains as a chat model, and why.
NO_CHAT_MODELS = {
    "encoders, whose tokens see both sides; as decoders they stand for half of an encoder-decoder": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"
    ),
    "decoders of models that translate, summarize, write down speech or read images": (
        "bart bigbird_pegasus blenderbot blenderbot-small git marian mbart mvp pegasus plbart prophetnet trocr whisper"
    ),
    "speech and music": "moshi musicgen musicgen_melody",
    "drafts for speculative decoding, which read another model's states": "gemma4_assistant gemma4_unified_assistant",
}
# The families that are trained most today, by the types of their models.
FAMILIES = {
    "Llama 3": "llama",
    "Llama 4": "llama4 llama4_text",
    "Qwen2.5": "qwen2 qwen2_moe",
    "Qwen3": "qwen3 qwen3_moe",
    "Qwen3-Next": "qwen3_next",
    "Qwen3.5, 3.6, 3.8": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    "Gemma 2, 3, 3n, 4": "gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text",
    "Mistral, Ministral": "mistral ministral ministral3",
    "Mixtral": "mixtral",
    "Phi-3, Phi-4": "phi3 phimoe phi4_multimodal",
    "gpt-oss": "gpt_oss",
    "DeepSeek V3, R1, Kimi K2": "deepseek_v3",
    "DeepSeek V3.2, V4": "deepseek_v32 deepseek_v4",
    "GLM-4, 4.5, 4.6": "glm4 glm4_moe glm4_moe_lite",
    "GLM-5": "glm_moe_dsa",
    "Olmo 2, 3": "olmo2 olmo3 olmoe",
    "Olmo Hybrid": "olmo_hybrid",
    "SmolLM3": "smollm3",
    "Granite 3, 4, 4-H": "granite granitemoe granitemoehybrid",
    "Nemotron, Nemotron-H": "nemotron nemotron_h",
    "LFM2": "lfm2 lfm2_moe",
    "Kimi-Linear": "kimi_linear",
    "Falcon, Falcon-H1": "falcon falcon_h1",
    "Command R, Command A": "cohere cohere2",
    "MiMo": "mimo_v2_flash",
    "MiniMax": "minimax minimax_m2",
    "ERNIE 4.5, Hunyuan, Seed-OSS": "ernie4_5 ernie4_5_moe hunyuan_v1_dense hunyuan_v1_moe seed_oss",
}


def page(rows: list[harness.Row]) -> str:
    verdicts = {row["case"]["type"]: row["verdict"] for row in rows}
    left_out = {name for names in NO_CHAT_MODELS.values() for name in names.split()}
    built = [name for name, verdict in verdicts.items() if verdict != "not built"]
    chat = [name for name in built if name not in left_out]
    counts = {name: sum(verdict == name for verdict in verdicts.values()) for name in HEADINGS}
    shared = sum(verdicts[name] == "shared" for name in chat)
    lines = [
        "# Model types",
        "",
        "`python -m benchmarks.coverage --record` writes this page and its results file, `coverage_cpu.json`. It",
        "builds a tiny random model of every causal-LM type of transformers "
        f"{rows[0]['run']['versions']['transformers']}, and compares",
        "shared passes with separate calls of the model in float64: log-probabilities and the gradient of every",
        "parameter.",
        "",
        f"Of {len(rows)} types, {len(built)} can be built. {counts['shared']} of these share prefixes, "
        f"{counts['unshared']} run",
        f"unshared, {counts['refused']} are refused, and {counts['WRONG']} are wrong. {len(chat)} of those that can",
        f"be built are models that one trains to chat (the last section names the others), and {shared} of these",
        "share prefixes.",
        "",
        "## Families",
        "",
        "| family | model types | prefixes |",
        "|---|---|---|",
    ]
    for family, names in FAMILIES.items():
        found = sorted({verdicts[name] for name in names.split()})
        lines.append(f"| {family} | {', '.join(f'`{name}`' for name in names.split())} | {', '.join(found)} |")
    for verdict, (title, about) in HEADINGS.items():
        found = [row for row in rows if row["verdict"] == verdict]
        if not found:
            continue
        lines += ["", f"## {title}", "", about, ""]
        if verdict == "shared":
            lines.append(", ".join(f"`{row['case']['type']}`" for row in found) + ".")
            continue
        lines += ["| type | why |", "|---|---|"]
        lines += [f"| `{row['case']['type']}` | {row['why'].replace('|', '/')} |" for row in found]
    lines += ["", "## Types that are no chat models", "", "They are examined too, and listed above.", ""]
    for why, names in NO_CHAT_MODELS.items():
        lines.append(f"- {why}: {', '.join(f'`{name}`' for name in names.split())}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__)
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="default: all of the installed transformers")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    rows, run = [], harness.environment()
    path = harness.results_file("coverage", args)
    for model_type in args.types or tiny.causal_lm_types():
        try:
            with time_limit(SECONDS):
                found = examine(model_type)
        except TimeoutError as error:
            found = Found("not built", str(error), None)
        shown = "" if found.difference is None else f"{found.difference:.1e}"
        print(f"{model_type:26s} {found.verdict:9s} {shown:8s} {found.why}", flush=True)
        rows.append({"case": {"type": model_type}, **found._asdict()})
        harness.record(path, rows[-1:], run)
    if args.output == harness.RESULTS:
        Path(PAGE).write_text(page(harness.read(path)), "utf-8")
    if any(row["verdict"] == "WRONG" for row in rows):
        sys.exit("coverage: some types are wrong")


if __name__ == "__main__":
    main()
