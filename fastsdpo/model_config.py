"""What is known of a model without its weights: configuration, dtype, adapter and tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from fastsdpo.modeling import (
    _dtype,
    _find_adapter,
    _fit_tokenizer,
    _load_tokenizer,
    _locate,
    _not_loaded,
    _tokenizer_place,
)


class Configuration(NamedTuple):
    """What is known of a model without its weights.

    Attributes:
        config: of transformers.
        dtype: that `load_model_and_tokenizer` would give the weights.
        adapter: `peft.PeftConfig` where the name is an adapter's; else None.
    """

    config: Any
    dtype: torch.dtype
    adapter: Any
    tokenizer: Any


def load_configuration(
    name: str | os.PathLike,
    *,
    gguf_file: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Configuration:
    """Configuration and tokenizer of what `load_model_and_tokenizer` loads, which need no weights.

    Args:
        device: that the dtype is for; it need not exist here.
        others: as `load_model_and_tokenizer`.

    Raises:
        FileNotFoundError, OSError, ValueError, ImportError: as `load_model_and_tokenizer`.
    """
    adapter, at, peft_config = _find_adapter(name, revision), revision, None
    if adapter is not None:
        from peft import PeftConfig

        chosen = {} if revision is None else {"revision": revision}
        peft_config = PeftConfig.from_pretrained(adapter.place.name, **chosen)
        name, at = adapter.base, adapter.base_revision
    place = _locate("name", name, gguf_file, at)
    try:
        config = AutoConfig.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.options)
    except OSError as error:
        raise _not_loaded("configuration", place, error) from error
    wanted = _dtype(dtype, device, place.gguf_file)
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or torch.float32
    loaded = _load_tokenizer(_tokenizer_place(tokenizer, adapter, place), trust_remote_code)
    if not loaded.chat_template:
        raise ValueError(f"load_configuration: the tokenizer of {name} must have a chat template, got none")
    _fit_tokenizer(loaded, rows=config.get_text_config().vocab_size)
    return Configuration(config, wanted, peft_config, loaded)


def has_weights(name: str | os.PathLike) -> bool:
    """Whether a folder or file holds weights; of a hub id it is taken for granted."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return True
    return any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.gguf"))
