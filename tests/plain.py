"""Log-probabilities of answers as any model gives them: a forward pass for each, nothing shared, nothing padded."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def answer_log_probs(
    model: nn.Module, prompt_ids: Sequence[int], completion_ids: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """``[T, V]``: log-probabilities of all tokens at each place of the answer; the softmax in ``dtype``."""
    logits = model(input_ids=torch.tensor([[*prompt_ids, *completion_ids]]), use_cache=False).logits[0]
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1, dtype=dtype)


def answer_logps(
    model: nn.Module, prompt_ids: Sequence[int], completion_ids: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """``[T]``: log-probabilities of the answer's own tokens."""
    log_probs = answer_log_probs(model, prompt_ids, completion_ids, dtype)
    return log_probs.gather(-1, torch.tensor(completion_ids)[:, None])[:, 0]
