"""Draws answers from the model: in this process (`generate`), or on a server that holds its weights."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("fastsdpo.online")

DEFAULT_TEMPERATURE = 0.7  # where neither the caller nor the model names one
# What a model's generation config says about how to draw.
SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


class Sample(NamedTuple):
    """One answer.

    Attributes:
        ids: its T token ids, with the end-of-turn token unless the answer was cut.
        logps: ``[T]`` log-probabilities at sampling time in nats; None if the sampler does not give them.
    """

    ids: list[int]
    logps: Tensor | None = None


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | None,
    end_ids: Sequence[int],
    batch_size: int | None = None,
    seed: str | None = None,
    streamer: Any = None,
) -> list[Sample]:
    """Draws one answer per prompt from the model's whole distribution (no top-k, top-p or penalties).

    Args:
        model: a causal LM of transformers, unwrapped.
        prompts: token ids, each with its generation prompt.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token. None follows the model's own generation config, with
            its top-k, top-p and penalties; if that config does not sample, the temperature is 0.7.
        end_ids: the tokens that end an answer, see `InteractionTokenizer.end_ids`.
        batch_size: how many prompts run at once, padded on the left; None: all. A model that padding disturbs runs
            prompts of one length at once.
        seed: makes the draws repeatable; None: torch's global generator draws.
        streamer: a streamer of `transformers`, which gets the tokens of one prompt's answer as they are drawn.

    Returns:
        Samples in the order of `prompts`, cut after the first of `end_ids`.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    settings: dict[str, Any] = {"do_sample": False}
    if temperature is None and own.do_sample:
        settings = {name: value for name in SAMPLING if (value := getattr(own, name, None)) is not None}
    elif temperature is None or temperature > 0:
        drawn = DEFAULT_TEMPERATURE if temperature is None else temperature
        settings = {"do_sample": True, "temperature": drawn, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(end_ids), pad_token_id=end_ids[0], **settings
    )
    _check_context(model, max(map(len, prompts), default=0), max_new_tokens)
    device = model.get_input_embeddings().weight.device
    samples: dict[int, Sample] = {}
    training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    # What is not set here, transformers would take from the model's own generation config.
    model.generation_config = config
    try:
        with torch.random.fork_rng(devices, enabled=seed is not None), torch.no_grad():
            if seed is not None:
                import random

                torch.manual_seed(random.Random(seed).getrandbits(63))
            for places in _batches(model, prompts, batch_size or max(1, len(prompts)), end_ids[0]):
                ids, mask = left_pad([prompts[place] for place in places], end_ids[0])
                out = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    streamer=streamer,
                    synced_gpus=False,  # what FSDP2 has divided is whole here (`unsharded`)
                )
                for place, row in zip(places, out[:, ids.shape[1] :].tolist()):
                    samples[place] = Sample(cut(row, end_ids))
    finally:
        model.generation_config = own
        model.train(training)
    return [samples[place] for place in range(len(prompts))]


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _check_context(model: Any, longest: int, max_new_tokens: int) -> None:
    """Says once where an answer may reach beyond the positions that the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest + max_new_tokens > limit:
        _warn_once(
            f"a prompt and its answer of at most {max_new_tokens} tokens are longer than the {limit:,} positions that "
            "the model was made for: expect poor answers there; set a smaller max_prompt_length"
        )


def _batches(model: Any, prompts: Sequence[Sequence[int]], size: int, pad_id: int) -> list[list[int]]:
    """The places of the prompts that run at once, at most ``size``."""
    if model.config.model_type == "rwkv":
        size = 1  # transformers steps rows of a batch to other logits than alone
    groups = [list(range(len(prompts)))]
    if size > 1 and len({len(prompt) for prompt in prompts}) > 1 and _padding_disturbs(model, prompts, pad_id):
        by_length: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(place)
        groups = list(by_length.values())
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _padding_disturbs(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Whether the model answers a prompt otherwise behind padding, whatever the mask says.

    RecurrentGemma takes padding into its states, and DeepSeek V4 counts it into the stretches of tokens that it
    compresses. Tried with the longest prompt that will be padded, and an odd count of padding tokens.
    """
    from transformers import GenerationConfig

    first = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True
    )
    lengths = sorted({len(prompt) for prompt in prompts})
    prompt = next(list(prompt) for prompt in prompts if len(prompt) == lengths[-2])
    device, found = model.get_input_embeddings().weight.device, []
    for padding in (0, (lengths[-1] - lengths[-2]) | 1):
        ids = torch.tensor([[pad_id] * padding + prompt], device=device)
        mask = torch.tensor([[0] * padding + [1] * len(prompt)], device=device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=first, synced_gpus=False)
        found.append(out.logits[0].double())
    # Rounding explains 0.015 (bfloat16), and models that read padding are off by 0.05 and more.
    return float((found[1] - found[0]).norm()) > 0.03 * float(found[0].norm())


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pads prompts on the left; returns ``(ids, mask)``, both ``[B, longest prompt]`` int64."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def cut(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Returns the ids up to and including the first end token."""
    for index, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: index + 1])
    return list(ids)


class ServerSampler:
    """Draws answers on a vLLM server through its OpenAI-compatible API.

    The server returns token ids (``return_token_ids``, vLLM 0.10.2 and later) and the log-probabilities
    with which it drew them, so that training sees exactly what was sampled. ``/v1/load_lora_adapter`` loads
    the trained adapter into the server. That needs ``--enable-lora`` and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` on the server, and a folder that both machines see.

    Args:
        url: the server's address, such as ``http://host:8000/v1``.
        model: the served model's name; None: the first that the server lists.
        folder: where adapters are written for the server.

    Raises:
        ImportError: the package openai is missing.
        ConnectionError: the server cannot be reached, or does not answer as vLLM does (`transformers serve` takes
            no token ids).
    """

    def __init__(
        self, url: str, model: str | None = None, *, folder: str | os.PathLike = "adapters", timeout: float = 600.0
    ):
        from fastsdpo.online.endpoint import connect

        self.client = connect(url, timeout=timeout)
        self.url, self.folder = url, os.path.abspath(folder)
        if model is None:
            try:
                listed = self.client.models.list().data
            except Exception as error:
                raise ConnectionError(f"ServerSampler: {url} cannot be reached: {error}") from error
            if not listed:
                raise ConnectionError(f"ServerSampler: {url} lists no models")
            model = listed[0].id
        self.model = model
        self._loaded: str | None = None

    def load_adapter(self, model: Any, name: str, values: dict[str, Tensor]) -> None:
        """Writes the adapter and has the server answer with it from now on.

        Args:
            model: a PEFT model with the adapter.
            name: what the server is to call the adapter.
            values: the adapter's whole (not sharded) parameters, by their names in ``model``.

        Raises:
            ConnectionError: the server refuses it.
        """
        path = os.path.join(self.folder, name)
        model.save_pretrained(path, state_dict=values)
        with self._refusing("an adapter (it needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)"):
            self.client.post("/load_lora_adapter", body={"lora_name": name, "lora_path": path}, cast_to=str)
        before = self._loaded
        self.use_adapter(name)
        if before is not None:
            self.client.post("/unload_lora_adapter", body={"lora_name": before}, cast_to=str)

    def use_adapter(self, name: str) -> None:
        """Takes answers from this adapter from now on. Another process may have loaded it."""
        self._loaded = name

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float | None,
        end_ids: Sequence[int],
        seed: int | None = None,
    ) -> list[Sample]:
        """Draws one answer per prompt from the model's whole distribution.

        Args:
            prompts, max_new_tokens, end_ids: as for `generate`.
            temperature: None leaves it to the server, which follows the model's own generation config with
                its top-k, top-p and penalties.
            seed: makes the draws repeatable; None: the server chooses.

        Raises:
            ConnectionError: the server refuses such prompts.
            RuntimeError: its answer lacks token ids or log-probabilities.
        """
        drawing: dict[str, Any] = {}
        if temperature is not None:  # the server would take what is not set from the model's config
            drawing = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        with self._refusing("prompts of token ids"):
            reply = self.client.completions.create(
                model=self._loaded or self.model,
                prompt=[list(prompt) for prompt in prompts],
                max_tokens=max_new_tokens,
                logprobs=0,
                seed=seed,
                extra_body={"return_token_ids": True, "stop_token_ids": list(end_ids), **drawing},
            )
        samples: list[Sample | None] = [None] * len(prompts)
        for choice in reply.choices:
            ids = getattr(choice, "token_ids", None)
            if not ids or choice.logprobs is None or choice.logprobs.token_logprobs is None:
                raise RuntimeError(
                    f"ServerSampler: {self.url} gave no token ids or log-probabilities; vLLM 0.10.2 or later is needed"
                )
            logps = torch.tensor([float(p) for p in choice.logprobs.token_logprobs])
            kept = cut(ids, end_ids)
            samples[choice.index] = Sample(kept, logps[: len(kept)])
        missing = [index for index, sample in enumerate(samples) if sample is None]
        if missing:
            raise RuntimeError(f"ServerSampler: {self.url} left out prompts {missing}")
        return samples  # type: ignore[return-value]

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Raises ConnectionError where the server refuses ``what``."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            if error.status_code not in (400, 404, 405, 422):
                raise
            raise ConnectionError(
                f"ServerSampler: {self.url} refused {what}: {error}. If it is no vLLM server: one is needed, since "
                "`transformers serve` takes text alone, gives no token ids or log-probabilities and loads no adapters"
            ) from error
