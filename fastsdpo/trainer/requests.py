"""What is asked of a trainer in calls and by other loaders, and cannot be followed: refused by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from fastsdpo.data import TokenizedInteraction

NO_SEARCH = (
    "SDPOTrainer: hyperparameter_search() and trials are not possible: model, tokens and teacher are made from the "
    "settings when the trainer is, and a trial would change settings alone. Make a trainer for each trial: with "
    "optuna, in the function that study.optimize() takes, and return trainer.evaluate()['eval_loss']"
)
# Of any evaluation: times, as transformers names them.
TIMES = ("runtime", "samples_per_second", "steps_per_second")


def check_metric(metric: str | None, held_out: Any, figures: Callable[[Any], Collection[str]]) -> None:
    """Looks for ``metric_for_best_model`` among what evaluations will report.

    Args:
        metric: None where nothing follows it.
        held_out: a dataset, a dict of several, or None.
        figures: those of a dataset, without a prefix.

    Raises:
        ValueError: no evaluation has it; transformers would find that out after the first one.
    """
    if metric is None or held_out is None:
        return
    sets = held_out if isinstance(held_out, dict) else {None: held_out}
    start = {name: "" if name is None else f"{name}_" for name in sets}
    known = [start[name] + figure for name, dataset in sets.items() for figure in (*figures(dataset), *TIMES)]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            "SDPOTrainer: metric_for_best_model must be a figure of the held-out data "
            f"({', '.join(known)}), got {metric!r}"
        )


def check_batches(batches: Iterable[Any], key: str) -> None:
    """Raises TypeError where a loader or collator of the caller's gives something else than micro-batches.

    Args:
        key: what a micro-batch has a list of.
    """
    for batch in batches:
        items = batch.get(key) if isinstance(batch, Mapping) else None
        tokens = key != "interactions" or all(isinstance(item, TokenizedInteraction) for item in items or ())
        if isinstance(items, list) and tokens:
            continue
        got = f"one with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            "SDPOTrainer: a data loader must give micro-batches as the trainer's data_collator makes them, a dict "
            f"with a list of {key}, got {got}"
        )
