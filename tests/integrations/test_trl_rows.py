"""Rows of `prepare --layout trl` in TRL's own SFTTrainer."""

import json

import pytest

pytest.importorskip("trl")

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fastsdpo.commands.prepare import main

TURNS = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6"), ("user", "w7")]


def test_sft_trains_on_the_answers_alone(llama_folder, tmp_path):
    """The loss is that of the answers given their histories; the user's reactions are in no input."""
    messages = [{"role": role, "content": text} for role, text in TURNS]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages, "model": "m", "rating": {"stars": 1}}))
    output = str(tmp_path / "out.jsonl")
    options = ["--preset", "none", "--layout", "trl", "--keep", "model,rating", "--quiet"]
    assert main([str(tmp_path / "in.jsonl"), "-o", output, *options]) == 0
    rows = load_dataset("json", data_files=output, split="train", cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "completion", "user_response", "model", "rating"} <= set(rows.column_names)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama_folder)
    args = SFTConfig(output_dir=str(tmp_path / "run"), save_strategy="no", disable_tqdm=True, **settings)
    trainer = SFTTrainer(model=llama_folder, args=args, train_dataset=rows, processing_class=tokenizer)
    read = []
    for row in trainer.train_dataset:
        trained = [token for token in row["labels"] if token != -100]
        read.append((tokenizer.decode(row["input_ids"]), tokenizer.decode(trained)))
    assert read == [
        ("<user> w1 w2 <end> <assistant> w3 <end>", "w3 <end>"),
        ("<user> w1 w2 <end> <assistant> w3 <end> <user> w4 <end> <assistant> w5 w6 <end>", "w5 w6 <end>"),
    ]
    assert 0 < trainer.train().training_loss < 20
