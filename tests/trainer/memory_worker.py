"""Peak memory of training steps beside the forecast, as JSON. See test_memory.

A process of its own: what the tests before have allocated and freed would hide a peak.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fastsdpo.bench import peak_memory
from fastsdpo.data import TokenizedInteraction
from fastsdpo.trainer import SDPOConfig, SDPOTrainer
from fastsdpo.trainer.memory_walk import ModelShape, walk_step

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 512}


def interactions(conversations):
    draw = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(3, 8192, (count,), generator=draw).tolist()

    found = []
    for _ in range(conversations):  # of two interactions
        first = ids(200)
        for prompt in (first, first + ids(150)):
            found.append(TokenizedInteraction(prompt, prompt + ids(30), ids(100)))
    return found


def measured(folder, *, kind="Llama", dtype="float32", lora=False, conversations=3, **settings):
    """Bytes above the model's weights and the teacher's: forecast, measured, and the forecast whole."""
    torch.manual_seed(0)
    config, model = {"Llama": (LlamaConfig, LlamaForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    head = {"head_dim": 64} if kind == "Qwen3" else {}
    made = model(config(**SHAPE, **head, tie_word_embeddings=kind == "Qwen3"))
    adapter = None
    if lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "teacher_check": 0}
    args = SDPOConfig(output_dir=folder, use_cpu=True, optim="adamw_torch", **quiet, **settings)
    items = interactions(conversations)
    trainer = SDPOTrainer(made.to(getattr(torch, dtype)), args, items, peft_config=adapter)
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.create_optimizer()
    trainer.model.train()

    def run():  # states come with the first step; with them there are the second pass's gradients too
        for last in (False, True):
            trainer.training_step(trainer.model, {"interactions": items}, torch.tensor(len(items)))
            if not last:
                trainer.optimizer.step()

    peak = peak_memory(run)
    shape = ModelShape(made.config, getattr(torch, dtype), adapter)
    forecast = walk_step(shape, args, [items, items], kind="cpu")
    standing = forecast.parts["weights"] + forecast.parts["teacher"]
    return forecast.peak - standing, peak, forecast


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured(sys.argv[1], conversations=1)  # loads the libraries
    for name, settings in json.loads(sys.argv[2]).items():
        said, peak, parts = measured(sys.argv[1], **settings)
        print(json.dumps([name, said, peak, parts.parts]), flush=True)
