"""Plain PyTorch loops, Lightning and the Hugging Face `Trainer`: log-probs and losses without logits.

    model(**inputs).logits  ->  log_softmax  ->  gather          (B, L, V) twice and more

becomes `fused_logps`. The model runs as it is wrapped (DDP, FSDP2, PEFT, autocast). A hook takes the hidden
states before the head, and logits exist for one chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo.integrations._distillation import IGNORE_INDEX
from fastsdpo.ops.checks import shape_text
from fastsdpo.ops.divergence import sdpo_loss
from fastsdpo.ops.linear_token_logps import linear_token_logps
from fastsdpo.prefix import HeadParameters, causal_lm, head_parameters, run_inside
from fastsdpo.prefix import gathered as gathered
from fastsdpo.prefix import is_partitioned as is_partitioned


def gathered_head(*models: nn.Module) -> AbstractContextManager[None]:
    """Holds the models' heads whole under DeepSpeed ZeRO-3, as the losses from hidden states need them.

    Those losses never call the head's own forward pass, which would gather it. The loss must form its gradients
    inside this context, as `linear_sdpo_loss` does.
    """
    return gathered(*(parameter for model in models for parameter in _of_head(model)))


def _of_head(model: nn.Module) -> Iterator[nn.Parameter]:
    inner: Any = causal_lm(model)
    return inner.get_output_embeddings().parameters()


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
        ``[B, L]`` float32, differentiable; 0 where the label is -100, and at t = 0, which no logits predict. With
        ``return_entropy`` the pair ``(logps, entropy)``, the entropy detached.

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
            return label_logps(hidden[:, :-1], head, labels[:, 1:], temperature, return_entropy, chunk_size)

    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    found = run_inside(model, body, {"input_ids": input_ids, "use_cache": False, **inputs})
    logps, *entropy = (nn.functional.pad(values, (1, 0)) for values in found)
    return (logps, entropy[0]) if return_entropy else logps


def label_logps(
    hidden: Tensor,
    head: HeadParameters,
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
        hidden[keep].to(head.weight.device),
        target_ids=target_ids[keep].to(head.weight.device),
        **head._asdict(),
        temperature=temperature,
        return_entropy=return_entropy,
        chunk_size=chunk_size,
    )
    vectors = found if isinstance(found, tuple) else (found,)
    whole = vectors[0].new_zeros(target_ids.shape)
    return tuple(whole.masked_scatter(keep, vector.to(whole.device)) for vector in vectors)


# --------------------------------------------------------------------- Hugging Face Trainer


class SDPOLabels(dict):
    """The labels of a batch for `sdpo_loss_func`: target ids and what the teacher says of them.

    A dict with ``labels [B, L]`` (aligned with ``input_ids``, -100 where a token does not count) and
    one teacher, aligned with the labels: ``teacher_logps [B, L]``, or ``teacher_topk_ids`` and
    ``teacher_topk_logps [B, L, K]``. Further keys: ``old_logps [B, L]`` for ``is_clip``.

    `Trainer` counts the tokens of a step with `ne`, as it does for a tensor of labels.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return super().__getitem__("labels")[key]

    def ne(self, value: int) -> Tensor:
        return self["labels"].ne(value)


TEACHERS = {"sampled_token": ("teacher_logps",), "topk": ("teacher_topk_ids", "teacher_topk_logps")}


def sdpo_loss_func(
    *,
    mode: str = "sampled_token",
    alpha: float = 1.0,
    add_tail: bool = True,
    is_clip: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_grad: bool = False,
) -> Callable[..., Tensor]:
    """A ``compute_loss_func`` for `transformers.Trainer`: the teacher's scores come in the labels.

        Trainer(model, args, compute_loss_func=sdpo_loss_func(mode="topk"), data_collator=...)

    The collator puts an `SDPOLabels` under ``"labels"``. Its scores come from `fused_logps` of the teacher, from
    `fastsdpo.integrations.vllm`, or from a data set. The loss is the mean over all tokens of the optimizer step
    (``num_items_in_batch``), so gradient accumulation and data parallelism do not change it. The model forms its
    logits. A trainer that works without logits overrides ``Trainer.compute_loss`` and calls `fused_logps`.

    Args:
        mode: "sampled_token" with ``teacher_logps``, "topk" with ``teacher_topk_ids`` and ``_logps``.
        inplace_grad: lets the gradient overwrite the logits, for models whose head is the last operation; autograd
            raises for others.
        others: as `fastsdpo.sdpo_loss`; ``softcap`` only where the model has not applied its own.

    Raises:
        ValueError: another mode, as only one-token and top-k teachers can come in the labels; from the loss:
            labels that are no `SDPOLabels`, or lack a key.
        NotImplementedError: from the loss, under `torch.nn.DataParallel`.
    """
    if mode not in TEACHERS:
        raise ValueError(f"sdpo_loss_func: mode must be one of {tuple(TEACHERS)}, got {mode!r}")
    fixed = {
        "mode": mode,
        "alpha": alpha,
        "temperature": temperature,
        "softcap": softcap,
        "inplace_grad": inplace_grad,
    }

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        _check_labels(labels, ("labels", *TEACHERS[mode], *(("old_logps",) if is_clip is not None else ())), mode)
        _check_items(num_items_in_batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        # Aligned with the labels: row t of the logits predicts label t + 1.
        target_ids, *teacher = (labels[key][:, 1:] for key in ("labels", *TEACHERS[mode]))
        given: dict[str, Any] = {"teacher_logps": teacher[0]}
        if mode == "topk":
            given = {"teacher_topk": tuple(teacher), "add_tail": add_tail}
        if is_clip is not None:
            given |= {"old_logps": labels["old_logps"][:, 1:], "is_clip": is_clip}
        counts = target_ids != IGNORE_INDEX
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        weights = counts / torch.as_tensor(items, device=logits.device).clamp(min=1)
        return sdpo_loss(logits[:, :-1], None, target_ids, weights=weights, **fixed, **given).loss

    return compute_loss


def _check_labels(labels: Any, needed: tuple[str, ...], mode: str) -> None:
    # Trainer counts the tokens of SDPOLabels, but not those of another mapping. Without the count every
    # micro-batch would weigh as much as a whole step.
    if not isinstance(labels, SDPOLabels) or not set(needed) <= set(labels):
        got = type(labels).__name__
        if isinstance(labels, Mapping):
            got += f" of {sorted(labels)}"
        raise ValueError(
            f"sdpo_loss_func: labels must be SDPOLabels with {', '.join(needed)} for mode={mode!r}, got {got}"
        )


def _check_items(num_items_in_batch: Tensor | int | None) -> None:
    if getattr(num_items_in_batch, "ndim", 0):
        raise NotImplementedError(
            "sdpo_loss_func: torch.nn.DataParallel (several GPUs in one process) is not supported: "
            "Trainer multiplies the loss by their number; start one process per GPU with torchrun"
        )
