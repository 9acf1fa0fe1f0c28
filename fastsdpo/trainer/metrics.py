"""The statistics of the signal over a logging window or an evaluation, over all processes.

Passes append small detached tensors; nothing is moved to the host or sent between processes until
`flush`, once per window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsdpo.data import TokenizedInteraction
from fastsdpo.trainer.loss import TokenStatistics

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
NAMES = [f"sdpo/{name}" for name in ("log_ratio_mean", "log_ratio_std", "log_ratio_abs_mean", "student_logp")]
NAMES += [f"sdpo/{name}" for name in ("teacher_logp", "eos_log_ratio", "response_tokens", "tokens_per_second")]
NAMES += ["sdpo/sequence_tokens_per_second"]
QUANTILE_SAMPLE = 65536  # values per process that go into the quantiles, evenly spaced


class SignalMetrics:
    """Collects `TokenStatistics`; one value per token that counts.

    The window's cost is 24 bytes of device memory per response token.

    Args:
        reference_kl: whether the loss has the reference term, which is then reported. (Told, not
            seen from the passes: a process may have none, and all have to send the same numbers.)
        divergence: whether the per-token loss is a divergence (else it is the sampled token's).
        end_id: the token that ends a turn; an answer that ends with another was cut. None: none is.
    """

    def __init__(self, *, reference_kl: bool = False, divergence: bool = True, end_id: int | None = None):
        self.reference_kl, self.end_id = reference_kl, end_id
        self.loss_name = "sdpo/divergence" if divergence else "sdpo/sampled_token_loss"
        self.reset()

    @property
    def names(self) -> list[str]:
        """Of what `flush` gives in one process where anything was added."""
        found = [*NAMES, *(f"sdpo/log_ratio_{name}" for name in QUANTILES), self.loss_name]
        return [*found, *(["sdpo/reference_kl"] if self.reference_kl else [])]

    def reset(self) -> None:
        self.passes: list[tuple[Tensor, Tensor]] = []
        self.computed = self.sequences = 0
        self.started = time.perf_counter()

    def add(self, pack: Sequence[TokenizedInteraction], statistics: TokenStatistics, counts: bool = True) -> None:
        """One pass over the interactions of a pack.

        Args:
            counts: False where another process counts the interactions (``ulysses``), and this one its tokens alone.
        """
        self.computed += statistics.computed_tokens
        if not counts:
            return
        ends, row = [], -1
        for item in pack:
            row += len(item.completion_ids)
            whole = self.end_id is None or item.completion_ids[-1] == self.end_id
            ends.append(row if whole else -1)  # -1: the answer was cut
            self.sequences += len(item.prompt_ids) + len(item.teacher_prompt_ids) + 2 * len(item.completion_ids)
        kl = statistics.reference_kl
        columns = [
            statistics.counts,
            statistics.log_ratio,
            statistics.student_logps,
            statistics.teacher_logps,
            statistics.per_token_loss,
            torch.zeros_like(statistics.per_token_loss) if kl is None else kl,
        ]
        self.passes.append((torch.stack([c.float() for c in columns]), torch.tensor(ends)))

    def flush(self, *, reduce_sum: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means, spread and quantiles (nats) since the last flush; empty where nothing was added.

        ``sdpo/tokens_per_second`` counts the tokens that all processes computed, of every forward pass
        of student and teachers, shared prefixes once; ``sdpo/sequence_tokens_per_second`` those of the
        student's and the teacher's whole sequences, as a trainer without sharing would compute them.
        ``sdpo/imbalance``, with several processes, is the most tokens that one of them computed, over the mean:
        the others wait for it.
        Seconds are wall time, sampling and data included.

        Args:
            reduce_sum: sums a ``[n]`` tensor over the processes.
            gather: concatenates 1-D tensors of any length over the processes.
        """
        seconds = time.perf_counter() - self.started
        device = self.passes[0][0].device if self.passes else None
        values, ends = torch.zeros(6, 0, device=device), torch.zeros(0, device=device)
        if self.passes:
            at_ends = [columns[:, at[at >= 0].to(device)] for columns, at in self.passes]
            ends = torch.cat([columns[1, columns[0] > 0] for columns in at_ends])
            values = torch.cat([columns[:, columns[0] > 0] for columns, _ in self.passes], dim=1)
        values, ends = values.cpu().double(), ends.cpu().double()
        ratio = values[1]
        sums = torch.tensor(
            [
                ratio.numel(),
                self.computed,
                self.sequences,
                ends.numel(),
                float(ends.sum()),
                float(ratio.sum()),
                float(ratio.square().sum()),
                float(ratio.abs().sum()),
                *(float(row.sum()) for row in values[2:]),
            ],
            dtype=torch.float64,
        )
        step = max(1, math.ceil(ratio.numel() / QUANTILE_SAMPLE))
        loads = gather(sums[1:2])
        sums, sample = reduce_sum(sums), gather(ratio[::step])
        self.reset()

        count, computed, sequences, eos, eos_sum, total, squares, absolute = sums[:8].tolist()
        student, teacher, divergence, kl = sums[8:].tolist()
        if count == 0:
            return {}
        mean = total / count
        metrics = {
            "sdpo/log_ratio_mean": mean,
            "sdpo/log_ratio_std": math.sqrt(max(0.0, squares / count - mean * mean)),
            "sdpo/log_ratio_abs_mean": absolute / count,
            "sdpo/student_logp": student / count,
            "sdpo/teacher_logp": teacher / count,
            self.loss_name: divergence / count,
        }
        if self.reference_kl:
            metrics["sdpo/reference_kl"] = kl / count
        if eos > 0:
            metrics["sdpo/eos_log_ratio"] = eos_sum / eos
        points = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
        for name, value in zip(QUANTILES, sample.double().quantile(points).tolist()):
            metrics[f"sdpo/log_ratio_{name}"] = value
        metrics["sdpo/response_tokens"] = count
        metrics["sdpo/tokens_per_second"] = computed / max(seconds, 1e-9)
        metrics["sdpo/sequence_tokens_per_second"] = sequences / max(seconds, 1e-9)
        if len(loads) > 1:
            metrics["sdpo/imbalance"] = float(loads.max()) / max(1.0, computed / len(loads))
        return metrics
