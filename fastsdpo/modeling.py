"""Loads a causal language model and its tokenizer: a folder, a hub id, a GGUF file, or an adapter.

One loader for every command, so that `fastsdpo signal`, `train` and `online` accept the same names
and fail with the same sentences.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

from fastsdpo.lazy import needed
from fastsdpo.ops.backend import usable_device
from fastsdpo.quantized import check_quantize, packing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model_and_tokenizer(
    name: str | os.PathLike,
    *,
    gguf_file: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    require_chat_template: bool = True,
    quantize: str | None = None,
) -> tuple[Any, Any]:
    """The model, in eval mode and on its device, and its tokenizer.

    Args:
        name: a folder with a saved model, a file ``*.gguf``, a folder with one GGUF file and no
            ``config.json``, or a hub id (``"HuggingFaceTB/SmolLM2-135M-Instruct"``). Where it holds
            an adapter of PEFT, the base model that the adapter names is loaded, and the adapter on it.
        gguf_file: the GGUF file in the folder or hub repository `name` (of an adapter: of its base).
            GGUF weights are dequantized to `dtype`, and the model keeps no trace of the file: it
            trains, saves and loads again like any other.
        tokenizer: folder, hub id or GGUF file of the tokenizer; None: the model's (an adapter's own,
            or its base model's).
        revision: branch, tag or commit of a hub id.
        dtype: a torch dtype, its name, ``"auto"`` (the checkpoint's; float32 for GGUF), or None:
            `default_dtype` of the device.
        device: where to put the model; None: CUDA where there is one, else the CPU.
        attn_implementation: as in transformers (``"eager"``, ``"sdpa"``, ...); None: its default.
        trust_remote_code: run Python code that comes with the model.
        require_chat_template: raise where the tokenizer has no chat template.
        quantize: ``"4bit"`` (NF4, computing in `dtype`) or ``"8bit"``: bitsandbytes packs the weights of
            the linear layers but the head's (of an adapter: of its base). An adapter alone can be trained.

    Returns:
        ``(model, tokenizer)``, transformers objects; the model of an adapter is a `peft.PeftModel`,
        whose adapter is trainable and nothing else (prompt learning, which PEFT cannot go on with,
        is frozen). A tokenizer without a pad token pads with its eos token.

    Raises:
        FileNotFoundError: nothing at that path, or the file is not in the folder.
        OSError: the hub id does not exist or the hub cannot be reached.
        ValueError: not a GGUF file, several to choose from, weights missing in the checkpoint, no
            chat template, token ids that the model has no embedding for, an unknown dtype, a GGUF file
            to be quantized.
        ImportError: a GGUF file without the packages gguf and accelerate; an adapter without peft;
            ``quantize`` without bitsandbytes.
    """
    check_quantize(quantize)
    adapter, place = _find(name, gguf_file, revision)
    if quantize is not None and place.gguf_file is not None:
        raise ValueError(f"load_model_and_tokenizer: quantize must be left out for a GGUF file, got {quantize!r}")
    device = usable_device(device)
    dtype = _dtype(dtype, device, place.gguf_file)
    packed = packing(quantize, device, dtype)
    loaded: Any = _load_tokenizer(_tokenizer_place(tokenizer, adapter, place), trust_remote_code)
    if require_chat_template:
        _check_chat_template(loaded, name)
    model = _load_model(place, dtype, attn_implementation, trust_remote_code, packed)
    if adapter is not None:
        model = _load_adapter(model, adapter)
    embedding = model.get_input_embeddings().weight
    _fit_tokenizer(loaded, rows=getattr(embedding, "ds_shape", embedding.shape)[0])  # DeepSpeed ZeRO-3 empties it
    return model.to(device), loaded


def check_chat_model(name: str | os.PathLike) -> None:
    """Raises what `load_model_and_tokenizer` would, as far as it can be told without the weights."""
    adapter, place = _find(name)
    _check_chat_template(_load_tokenizer(_tokenizer_place(None, adapter, place), False), name)


def _check_chat_template(tokenizer: Any, name: str | os.PathLike) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"load_model_and_tokenizer: the tokenizer of {name} must have a chat template, got "
            "none; use an instruction-tuned model, or pass the tokenizer of one"
        )


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer alone, of a folder, hub id or GGUF file.

    Raises:
        FileNotFoundError, OSError, ValueError: nothing is there, or it has no tokenizer that can be read.
    """
    return _load_tokenizer(_locate("tokenizer", name), trust_remote_code=False)


def _fit_tokenizer(tokenizer: Any, rows: int) -> None:
    """Gives the tokenizer a pad token, and checks that its ids are rows of the model's embedding."""
    _drop_invented_tokens(tokenizer, rows)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"load_model_and_tokenizer: the tokenizer's ids must be below the model's {rows} "
            f"embedding rows, got {largest}; do model and tokenizer belong together?"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def check_name(name: str | os.PathLike) -> None:
    """Raises what `load_model_and_tokenizer` would where nothing is behind a name; loads nothing."""
    _locate("name", name)


class _Location(NamedTuple):
    """A local folder or a hub id, and the GGUF file in it that is meant, if any."""

    name: str
    gguf_file: str | None
    local: bool
    revision: str | None

    @property
    def options(self) -> dict[str, Any]:
        """What transformers' loaders need to know of it, beside the name."""
        options: dict[str, Any] = {"revision": self.revision or "main", "local_files_only": self.local}
        return options if self.gguf_file is None else {**options, "gguf_file": self.gguf_file}


def _find(
    name: str | os.PathLike, gguf_file: str | None = None, revision: str | None = None
) -> tuple[_Adapter | None, _Location]:
    """The adapter behind a name, if it is one, and the model: the adapter's base, or what the name says."""
    adapter = _find_adapter(name, revision)
    if adapter is None:
        return None, _locate("name", name, gguf_file, revision)
    place = _locate(adapter.says, adapter.base, gguf_file, adapter.base_revision)
    if place.local and (Path(place.name) / "adapter_config.json").exists():
        raise ValueError(
            f"load_model_and_tokenizer: {adapter.says} must be a whole model, but {place.name} is an "
            "adapter too; merge that into its own base model (fastsdpo merge)"
        )
    return adapter, place


def _locate(
    argument: str, name: str | os.PathLike, gguf_file: str | None = None, revision: str | None = None
) -> _Location:
    """What is behind a name; ``argument`` says in messages where it comes from."""
    function = "load_model_and_tokenizer"
    path = Path(name).expanduser()
    if path.is_file():
        if gguf_file is not None:
            raise ValueError(f"{function}: gguf_file needs a folder or hub id as name, got {name}")
        path, gguf_file = path.parent, path.name
    elif path.is_dir():
        if gguf_file is None and not any((path / file).exists() for file in ("config.json", "tokenizer_config.json")):
            found = sorted(file.name for file in path.glob("*.gguf"))
            if not found:
                raise FileNotFoundError(
                    f"{function}: folder {name} must hold config.json or a .gguf file, "
                    "got neither; is it a training output whose model is in a subfolder?"
                )
            if len(found) > 1:
                raise ValueError(
                    f"{function}: folder {name} holds {len(found)} GGUF files, choose one with "
                    f"gguf_file: {', '.join(found)}"
                )
            gguf_file = found[0]
    else:
        if not _is_hub_id(str(name)):
            raise FileNotFoundError(f"{function}: {argument}: no such file or folder: {name}")
        _find_on_hub(str(name), argument)
        return _Location(str(name), gguf_file, False, revision)
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise FileNotFoundError(f"{function}: no such file: {path / gguf_file}")
        with open(path / gguf_file, "rb") as file:
            start = file.read(4)
        if start != b"GGUF":
            raise ValueError(f"{function}: {path / gguf_file} must be a GGUF file, but it starts with {start!r}")
    return _Location(str(path), gguf_file, True, revision)


def _is_hub_id(name: str) -> bool:
    """Whether it is "model" or "owner/model"; anything else can only have meant a path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not name.endswith(".gguf")


def is_adapter(name: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether ``name`` holds an adapter of PEFT in place of a whole model."""
    return _find_adapter(name, revision) is not None


class _Adapter(NamedTuple):
    """An adapter of PEFT on the disk or the hub, and the base model that it names."""

    place: _Location
    base: str
    base_revision: str | None
    has_tokenizer: bool
    says: str  # where the base model is named, for messages


def _find_adapter(name: str | os.PathLike, revision: str | None) -> _Adapter | None:
    """The adapter that ``name`` holds in place of a whole model, or None."""
    path = Path(name).expanduser()
    local = path.exists()
    place = str(path) if local else str(name)
    if path.is_file() or not (local or _is_hub_id(place)):
        return None
    if not local:
        _find_on_hub(place)
    try:
        config = find_adapter_config_file(place, revision=revision, local_files_only=local)
    except OSError:
        return None  # no such repository: whoever loads the model says so
    if config is None:
        return None
    says = f"base_model_name_or_path of {os.path.join(place, 'adapter_config.json')}"
    if any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        raise ValueError(
            f"load_model_and_tokenizer: folder {name} must hold a model or an adapter, got both; "
            "move adapter_config.json and the adapter's weights to a folder of their own"
        )
    content = json.loads(Path(config).read_text("utf-8"))
    if not content.get("base_model_name_or_path"):
        raise ValueError(
            f"load_model_and_tokenizer: {says} must be a folder or hub id, got "
            f"{content.get('base_model_name_or_path')!r}"
        )
    tokenizer = cached_file(
        place,
        "tokenizer_config.json",
        revision=revision,
        local_files_only=local,
        _raise_exceptions_for_missing_entries=False,
    )
    base, at = content["base_model_name_or_path"], _Location(place, None, local, revision)
    return _Adapter(at, base, content.get("revision"), tokenizer is not None, says)


def _load_adapter(model: Any, adapter: _Adapter) -> Any:
    """The `peft.PeftModel` of a base model and an adapter on it, ready to be trained on."""
    place, revision = adapter.place.name, adapter.place.revision
    with needed("peft", f"load_model_and_tokenizer: {place} is an adapter, which", "'fastsdpo[peft]'"):
        from peft import PeftConfig, PeftModel
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        config = PeftConfig.from_pretrained(place, **options)
        with warnings.catch_warnings():
            # Otherwise these weights would start from random values.
            warnings.filterwarnings("error", "Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, place, is_trainable=not config.is_prompt_learning, **options)
    except (OSError, ValueError, TypeError, RuntimeError, UserWarning) as error:
        mismatches = (line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise ValueError(
            f"load_model_and_tokenizer: the adapter in {place} cannot be put on its base "
            f"model {adapter.base}: {next(mismatches, error)}"
        ) from error
    return loaded.eval()


@lru_cache  # once for a name
def _find_on_hub(name: str, argument: str = "name") -> None:
    """Asks the hub once whether it has a repository of which nothing is in the cache here.

    The loaders ask for every file, again and again where there is no network: most of a minute for a
    folder whose name is mistyped.

    Raises:
        OSError: it has not, or it cannot be reached.
    """
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    if (cached / "snapshots").is_dir():
        return
    try:
        HfApi().model_info(name, timeout=10)
        return
    except GatedRepoError:
        return  # the loader says how to ask for access
    except RepositoryNotFoundError:
        why = "the hub has no model of that name (or it is private)"
    except HfHubHTTPError:
        return  # the loader tries again
    except Exception as error:  # whatever the hub's HTTP library raises without a network
        why = f"the hub cannot be reached: {error}"
    beside = Path(name).parent
    there = [path.as_posix() for path in beside.iterdir()] if beside.is_dir() else []
    close = difflib.get_close_matches(name, there, n=1)
    meant = f"; did you mean the folder {close[0]!r}?" if close else ""
    of = "" if argument == "name" else f"{argument}: "
    raise OSError(
        f"load_model_and_tokenizer: {of}{name!r} is no local folder or file, and as a hub id it cannot be loaded: "
        f"{why}{meant}"
    )


def default_dtype(device: torch.device) -> str:
    """The dtype of weights that are loaded by name: the one rule of trainers and commands.

    ``"float32"`` on a CPU, where half precision is slow; elsewhere ``"auto"``, the checkpoint's:
    bfloat16 for most models, which then train with a float32 master (`SDPOConfig.weight_update`).
    """
    return "float32" if device.type == "cpu" else "auto"


def _dtype(dtype: str | torch.dtype | None, device: torch.device, gguf_file: str | None) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        dtype = default_dtype(device)
    if dtype == "auto":
        return torch.float32 if gguf_file is not None else "auto"
    if dtype not in DTYPES:
        raise ValueError(f"load_model_and_tokenizer: dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _load_model(
    place: _Location,
    dtype: str | torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
    packed: dict[str, Any],
) -> Any:
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        **place.options,
        # What is loaded here is known to be no adapter: the hub need not be asked once more.
        "adapter_kwargs": {"local_files_only": True},
        **packed,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if place.gguf_file is not None:
        missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
        if missing:
            raise ImportError(
                f"load_model_and_tokenizer: GGUF files need the package {' and '.join(missing)}; "
                f"install with: pip install {' '.join(missing)}"
            )
        # Newer versions of transformers keep the weights packed unless told otherwise.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place.name, output_loading_info=True, **options)
    except (OSError, SafetensorError) as error:
        raise _not_loaded("model", place, error) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"load_model_and_tokenizer: the checkpoint of {place.name} lacks {len(missing)} of the "
            f"model's weights, which would start from random values: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    return _forget_gguf(model) if place.gguf_file is not None else model


def _forget_gguf(model: Any) -> Any:
    """Makes a dequantized model an ordinary one: without this it can neither train nor be saved."""
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "_weight_conversions"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
    return model


def _tokenizer_place(tokenizer: str | os.PathLike | None, adapter: _Adapter | None, model: _Location) -> _Location:
    """Of the tokenizer that is given; else the adapter's own, or the model's."""
    if tokenizer is not None:
        return _locate("tokenizer", tokenizer)
    return adapter.place if adapter is not None and adapter.has_tokenizer else model


def _load_tokenizer(place: _Location, trust_remote_code: bool) -> Any:
    names = ("*token*", "*vocab*", "*.model", "tekken*")
    if place.local and place.gguf_file is None and not any(any(Path(place.name).glob(name)) for name in names):
        raise FileNotFoundError(
            f"load_model_and_tokenizer: folder {place.name} holds no tokenizer; copy the one of its base model into it"
        )
    try:
        return AutoTokenizer.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.options)
    except OSError as error:
        raise _not_loaded("tokenizer", place, error) from error


def _drop_invented_tokens(tokenizer: Any, rows: int) -> None:
    """Removes ``<|endoftext|>`` where a GGUF file has no such token.

    The conversion from GGUF adds it after the last token of a byte-level vocabulary, as an id that
    the model has no embedding for: text that spells it would crash the model.
    """
    invented = "<|endoftext|>"
    added_beyond = tokenizer.get_vocab().get(invented, -1) >= rows
    if not (added_beyond and tokenizer.is_fast) or invented in tokenizer.all_special_tokens:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != invented]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _not_loaded(what: str, place: _Location, error: Exception) -> OSError:
    if place.local:
        return OSError(f"load_model_and_tokenizer: the {what} in folder {place.name} cannot be read: {error}")
    return OSError(
        f"load_model_and_tokenizer: {place.name!r} is no local folder or file, and as a hub id its {what} "
        f"cannot be loaded (wrong name, no access, or no network): {error}"
    )
