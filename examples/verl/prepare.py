"""Interactions as a data set of verl: prompts to answer, and what the self-teacher reads in their place.

    fastsdpo prepare conversations.json -o interactions.jsonl
    python examples/verl/prepare.py interactions.jsonl --model Qwen/Qwen3-8B -o train.parquet

verl's own columns are ``prompt``, ``data_source``, ``reward_model`` and ``extra_info``. ``teacher_prompt_ids`` are the
ids of the same prompt with the user's follow-up in it, as `fastsdpo.integrations.verl_self_teacher` reads them.
"""

from __future__ import annotations

import argparse

import pyarrow as pa
import pyarrow.parquet
from transformers import AutoTokenizer

from fastsdpo.data import HindsightTemplate, load_interactions


def rows_of(path: str, tokenizer, template: HindsightTemplate):
    for index, interaction in enumerate(load_interactions(path)):
        with_followup = template.apply(interaction.prompt, interaction.followup)
        text = tokenizer.apply_chat_template(with_followup, add_generation_prompt=True, tokenize=False)
        yield {
            "prompt": list(interaction.prompt),
            "data_source": "interactions",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
            "teacher_prompt_ids": tokenizer(text, add_special_tokens=False)["input_ids"],
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("interactions", help="JSONL of fastsdpo prepare")
    parser.add_argument("--model", required=True, help="name or folder, for its tokenizer")
    parser.add_argument("--template", default="online-v1", help="name of a hindsight template, or a text with {o}")
    parser.add_argument("-o", "--output", required=True, help="a .parquet file")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = list(rows_of(args.interactions, tokenizer, HindsightTemplate.parse(args.template)))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), args.output)
    return len(rows)


if __name__ == "__main__":
    print(f"{main()} prompts")
