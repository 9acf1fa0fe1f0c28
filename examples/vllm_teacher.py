"""A teacher behind vLLM's HTTP server scores a response; the student learns from the scores.

    vllm serve Qwen/Qwen3-8B --max-logprobs 20
    python examples/vllm_teacher.py --model Qwen/Qwen3-0.6B --server http://localhost:8000

Student and teacher share the tokenizer. The server is asked for ``prompt_logprobs`` of the teacher's
prompt and the response; ``--scores FILE`` reads a saved answer of it instead.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

import torch

import fastsdpo
from fastsdpo.integrations.vllm import teacher_from_prompt_logprobs
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.prefix import head_parameters, run_inside

PROMPT, ANSWER = "What is the capital of France?", "The capital is Lyon."
FOLLOWUP = "No, it is Paris."


def ask(server: str, token_ids: list[int], topk: int) -> dict:
    body = {"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": topk}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="the student")
    parser.add_argument("--server", default="http://localhost:8000")
    parser.add_argument("--scores", help="a saved choice of the server's answer, JSON")
    parser.add_argument("--topk", type=int, default=20)
    args = parser.parse_args(arguments)
    model, tokenizer = load_model_and_tokenizer(args.model)

    def context(text):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    response = tokenizer(ANSWER, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    scored = context(f"{PROMPT}\n\nThe user will say: {FOLLOWUP}") + response
    if args.scores:
        with open(args.scores) as file:
            choice = json.load(file)
    else:
        choice = ask(args.server, scored, args.topk)
    teacher = teacher_from_prompt_logprobs(
        [choice["prompt_logprobs"]], [scored], [len(response)], topk=args.topk, device=model.device
    )

    def body(hidden):
        head = head_parameters(model)
        return fastsdpo.linear_sdpo_loss(
            hidden[:, -len(response) - 1 : -1],
            None,
            head.weight,
            teacher.target_ids,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            mode="topk",
            alpha=0.0,
            teacher_topk=teacher.teacher_topk,
        )

    ids = torch.tensor([context(PROMPT) + response], device=model.device)
    out = run_inside(model, body, {"input_ids": ids, "use_cache": False})
    out.loss.backward()
    for token, student, hindsight in zip(response, out.student_logps[0], teacher.teacher_logps[0]):
        print(f"{tokenizer.decode([token])!r:>16} {student:8.3f} -> {hindsight:8.3f}")
    print(f"loss {out.loss.item():.4f}")
    return out.loss.item()


if __name__ == "__main__":
    main()
