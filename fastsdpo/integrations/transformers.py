"""Plain PyTorch loops, Lightning and the Hugging Face `Trainer`: log-probs and losses without logits.

    model(**inputs).logits  ->  log_softmax  ->  gather          (B, L, V) twice and more

becomes `fused_logps`: the model runs as it is wrapped (DDP, FSDP2, PEFT, autocast), a hook takes the
hidden states ahead of the head, and the head's logits exist a chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.integrations._losses import IGNORE_INDEX
from fastsdpo.ops._checks import shape_text
from fastsdpo.ops.linear import linear_token_logps
from fastsdpo.prefix import HeadParameters, head_parameters, run_inside
from fastsdpo.prefix.forward import causal_lm


@contextmanager
def gathered_head(*models: nn.Module) -> Iterator[None]:
    """Holds the heads' parameters whole where DeepSpeed ZeRO-3 has partitioned them.

    Under ZeRO-3 a parameter is empty outside its module's forward pass, and the losses from hidden
    states never call the head's. Parameters that are whole already (a head tied to the embedding
    inside the forward pass) are left to their owner; without ZeRO-3 this does nothing. The loss has
    to form its gradients here, in the forward pass, as `linear_sdpo_loss` does.
    """
    partitioned = {}
    for model in models:
        for parameter in causal_lm(model).get_output_embeddings().parameters():
            status = getattr(parameter, "ds_status", None)
            if status is not None and getattr(status, "name", "") != "AVAILABLE":
                partitioned[id(parameter)] = parameter
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(partitioned.values())):
        yield


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the model's head in shards."""
    head = causal_lm(model).get_output_embeddings()
    return any(hasattr(parameter, "ds_status") for parameter in head.parameters())


def fused_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    **inputs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under the model, without the logits.

        logps[b, t] = log softmax(logits[b, t - 1] / temperature)[labels[b, t]]

    Args:
        model: a transformers causal LM, bare or wrapped (DDP, FSDP2, PEFT, Accelerate).
        input_ids, attention_mask: ``[B, L]``, as the model takes them; the mask may be None.
        labels: ``[B, L]`` integer, aligned with ``input_ids`` (the shift is made here); -100 where
            a token does not count.
        temperature: divides the logits.
        return_entropy: also the entropy (nats) of the distribution that each label was drawn from.
        chunk_size: tokens per tile of logits; None chooses.
        inputs: more keyword arguments of the model (``position_ids``, ...).

    Returns:
        ``[B, L]`` float32, differentiable, 0 where the label is -100 and at t = 0, which nothing
        predicts; with ``return_entropy`` the pair ``(logps, entropy)``, the entropy detached.

    Raises:
        ValueError: labels of another shape than input_ids.
        NotImplementedError: a head that is more than a linear layer (see
            `fastsdpo.prefix.head_parameters`), DeepSpeed ZeRO-3 with gradients.

    Memory: a chunk of logits instead of ``[B, L, V]`` and its log-softmax, in forward and backward.
    """
    name = "fused_logps"
    if labels.shape != input_ids.shape or labels.ndim != 2:
        raise ValueError(
            f"{name}: labels must have the shape [B, L] of input_ids {shape_text(input_ids.shape)}, "
            f"got {shape_text(labels.shape)}"
        )
    if is_partitioned(model) and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: DeepSpeed ZeRO-3 frees the head before the backward pass, which needs it "
            "again; use linear_sdpo_loss inside fastsdpo.prefix.run_inside, or torch.no_grad()"
        )

    def body(hidden: Tensor) -> tuple[Tensor, ...]:
        with gathered_head(model):
            head = head_parameters(model)
            return label_logps(
                hidden[:, :-1], head, labels[:, 1:], temperature, return_entropy, chunk_size
            )

    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    found = run_inside(model, body, {"input_ids": input_ids, "use_cache": False, **inputs})
    logps, *entropy = (nn.functional.pad(values, (1, 0)) for values in found)
    return (logps, entropy[0]) if return_entropy else logps


def label_logps(
    hidden: Tensor,
    head: HeadParameters | Any,
    target_ids: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """``(logps,)`` or ``(logps, entropy)`` of ``target_ids [B, T]`` from ``hidden [B, T, D]``.

    Rows whose target is -100 never reach the head.
    """
    target_ids = target_ids.to(hidden.device)
    keep = target_ids != IGNORE_INDEX
    found = linear_token_logps(
        hidden[keep].to(head.weight.device), head.weight, target_ids[keep].to(head.weight.device),
        bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale,
        temperature=temperature, return_entropy=return_entropy, chunk_size=chunk_size,
    )  # fmt: skip
    vectors = found if isinstance(found, tuple) else (found,)
    whole = vectors[0].new_zeros(target_ids.shape)
    return tuple(whole.masked_scatter(keep, vector.to(whole.device)) for vector in vectors)
