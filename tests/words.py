"""A tokenizer whose tokens are words, and the shape of the smallest models that go with it."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", "<unk>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Of a causal LM. Weights far from uniform: teacher and student differ from the first step on.
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SHAPE |= {"initializer_range": 0.2}


def word_tokenizer(words: Iterable[str], special: Iterable[str] = SPECIAL, **options: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*special, *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **names, **options)
