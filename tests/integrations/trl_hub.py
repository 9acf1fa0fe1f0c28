"""What TRL's tests load from the Hugging Face hub, made here: models of the same classes and sizes, and data sets.

`make` writes a folder for HF_HOME: models in the layout of the hub's cache, which `from_pretrained` reads unchanged
under HF_HUB_OFFLINE=1. Weights are random, as wide as TRL draws them (a reward model must reach TRL's threshold). A
tokenizer is a byte-level BPE trained on `SENTENCES`, with the special tokens and the chat template (of the installed
TRL) of the model it stands for. `load_dataset` stands for that of `datasets`.

Not made: models that take images.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDatasetDict
from datasets import load_dataset as load_any_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ORGANIZATION = "trl-internal-testing"
COMMIT = 40 * "0"  # of every repository
TINY = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
META = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


class Model(NamedTuple):
    """A repository of the hub: a model's class, a chat template of TRL, special tokens."""

    of: str
    template: str
    special: tuple[str, ...]
    names: dict[str, str]
    shape: dict[str, Any] = {}  # noqa: RUF012


MODELS = {
    f"{ORGANIZATION}/tiny-Qwen2ForCausalLM-2.5": Model("Qwen2ForCausalLM", "qwen2_5", CHATML, QWEN),
    f"{ORGANIZATION}/tiny-Qwen2ForSequenceClassification-2.5": Model(
        "Qwen2ForSequenceClassification", "qwen2_5", CHATML, QWEN, {"hidden_size": 16, "num_labels": 1}
    ),
    f"{ORGANIZATION}/tiny-Qwen3ForCausalLM": Model("Qwen3ForCausalLM", "qwen3", CHATML, QWEN),
    f"{ORGANIZATION}/small-Qwen2ForCausalLM-2.5": Model(
        "Qwen2ForCausalLM", "qwen2_5", CHATML, QWEN, {"hidden_size": 128}
    ),
    f"{ORGANIZATION}/small-Qwen3ForCausalLM": Model("Qwen3ForCausalLM", "qwen3", CHATML, QWEN, {"hidden_size": 128}),
    f"{ORGANIZATION}/tiny-LlamaForCausalLM-3.2": Model("LlamaForCausalLM", "llama3_2", LLAMA, META),
    f"{ORGANIZATION}/tiny-RemoteForCausalLM": Model("LlamaForCausalLM", "llama3_2", LLAMA, META),
    "Qwen/Qwen2.5-0.5B-Instruct": Model("Qwen2ForCausalLM", "qwen2_5", CHATML, QWEN),
    "HuggingFaceTB/SmolLM3-3B": Model("Qwen2ForCausalLM", "qwen2_5", CHATML, QWEN),
}
REMOTE = {
    "configuration_remote.py": """
from transformers import LlamaConfig


class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "modeling_remote.py": """
from transformers import LlamaForCausalLM

from .configuration_remote import RemoteConfig


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
""",
}
REMOTE_MAP = {"AutoConfig": "configuration_remote.RemoteConfig"}
REMOTE_MAP["AutoModelForCausalLM"] = "modeling_remote.RemoteForCausalLM"


def make(home: Path) -> None:
    """Writes the models that are not there yet."""
    import trl

    transformers.utils.logging.disable_progress_bar()
    templates = Path(trl.__file__).parent / "chat_templates"
    for name, model in MODELS.items():
        place = home / "hub" / f"models--{name.replace('/', '--')}"
        if (place / "refs/main").exists():
            continue
        folder = place / "snapshots" / COMMIT
        tokenizer = make_tokenizer(model.special, model.names)
        tokenizer.chat_template = (templates / f"{model.template}.jinja").read_text("utf-8")
        tokenizer.save_pretrained(folder)
        save_model(model, tokenizer, folder, remote="Remote" in name)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs/main").write_text(COMMIT)  # last: what is whole


def save_model(model: Model, tokenizer: PreTrainedTokenizerFast, folder: Path, remote: bool) -> None:
    kind = getattr(transformers, model.of)
    shape = {**TINY, "intermediate_size": 32, **model.shape, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    made = kind(kind.config_class(**shape, **ends, bos_token_id=tokenizer.bos_token_id))
    for module in made.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    made = made.to(torch.bfloat16)
    if remote:
        made.config.auto_map = REMOTE_MAP
        for file, text in REMOTE.items():
            (folder / file).write_text(text.lstrip())
    made.save_pretrained(folder)
    if remote:
        config = folder / "config.json"
        text = config.read_text("utf-8").replace('"model_type": "llama"', '"model_type": "remote"')
        config.write_text(text.replace('"LlamaForCausalLM"', '"RemoteForCausalLM"'), "utf-8")


def make_tokenizer(special: Iterable[str], names: dict[str, str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(("".join(pair) for pair in SENTENCES), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


SENTENCES = [
    ("Water boils at", " a hundred degrees."),
    ("The moon turns", " around the earth in a month."),
    ("A triangle has", " three sides."),
    ("Bread is made of", " flour, water and salt."),
    ("Rivers flow", " into the sea."),
    ("In winter", " the days are short."),
    ("Bees", " make honey."),
    ("The capital of France is", " Paris."),
    ("Two and two are", " four."),
    ("Iron", " rusts."),
    ("A week has", " seven days."),
    ("Ice", " floats on water."),
    ("Sound is slower", " than light."),
    ("The heart", " pumps blood."),
    ("Snow is", " white."),
    ("An hour has", " sixty minutes."),
    ("Birds", " have feathers."),
    ("Glass is made", " of sand."),
    ("A year has", " twelve months."),
]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text.strip()}


def asked(text: str) -> list[dict[str, str]]:
    return [said("user", f"{text} ...?")]


ROWS = {
    "standard_language_modeling": lambda ask, answer: {"text": ask + answer},
    "standard_prompt_only": lambda ask, answer: {"prompt": ask},
    "standard_prompt_completion": lambda ask, answer: {"prompt": ask, "completion": answer},
    "conversational_language_modeling": lambda ask, answer: {"messages": [*asked(ask), said("assistant", answer)]},
    "conversational_prompt_only": lambda ask, answer: {"prompt": asked(ask)},
    "conversational_prompt_completion": lambda ask, answer: {
        "prompt": asked(ask),
        "completion": [said("assistant", answer)],
    },
}


CONVERSATIONS = ("HuggingFaceTB/OpenR1-Math-220k-default-verified", "HuggingFaceTB/Countdown-Tasks-3to4")


def load_dataset(path: str, *args: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, which has TRL's data sets of 17 rows and 2."""
    if path not in CONVERSATIONS and path != f"{ORGANIZATION}/zen":
        return load_any_dataset(path, *args, **options)
    name = "conversational_language_modeling" if path in CONVERSATIONS else args[0] if args else options["name"]
    rows = Dataset.from_list([ROWS[name](*pair) for pair in SENTENCES])
    splits = DatasetDict({"train": rows.select(range(17)), "test": rows.select(range(17, 19))})
    split, streaming = options.get("split"), options.get("streaming", False)
    if split is not None:
        which, _, end = split.rstrip("]").partition("[:")
        found = splits[which].select(range(int(end))) if end else splits[which]
        return found.to_iterable_dataset() if streaming else found
    if streaming:
        return IterableDatasetDict({key: value.to_iterable_dataset() for key, value in splits.items()})
    return splits
