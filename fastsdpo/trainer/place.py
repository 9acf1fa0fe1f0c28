"""Where in its data a checkpoint is: a run that goes on elsewhere would train on some of it twice, or never."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

PLACE_FILE = "data.json"  # in a checkpoint


def write_place(
    checkpoint: str | os.PathLike, step_size: int, order: dict[str, Any], stream: dict[str, Any] | None
) -> None:
    """Writes it.

    Args:
        step_size: what an optimizer step takes of the data, over all processes.
        order: what decides the order of data that lies there, by the names of settings.
        stream: where a stream is (`InteractionStream.state`); None: the data lies there, and the step says it.
    """
    text = json.dumps({"interactions_a_step": step_size, "order": order, "stream": stream})
    Path(checkpoint, PLACE_FILE).write_text(text + "\n")


def check_state(checkpoint: str | os.PathLike) -> None:
    """Raises ValueError where a checkpoint holds the model alone, or lacks a part of what training goes on from."""
    place = Path(checkpoint)
    states = any(place.glob("optimizer*")) and (place / "scheduler.pt").exists()
    if not states and not any(place.glob("global_step*")):  # which DeepSpeed writes
        raise ValueError(
            f"SDPOTrainer: checkpoint {checkpoint} holds the model alone (save_only_model), or was copied in part: "
            "optimizer and learning rate would begin anew, in the middle of the data; begin a run with it as its model"
        )


def read_place(
    checkpoint: str | os.PathLike, step_size: int, order: dict[str, Any], *, stream: bool
) -> dict[str, Any] | None:
    """What the checkpoint says of a stream; None where none is trained on.

    Raises:
        ValueError: the run has a stream and that of the checkpoint had none, or the reverse; or the data lies there,
            and a step takes another number of its interactions than before, or they come in another order.
    """
    try:
        found = json.loads(Path(checkpoint, PLACE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        found = {"interactions_a_step": step_size, "stream": None}
    kept, before = found["stream"], found["interactions_a_step"]
    if stream and kept is None:
        raise ValueError(
            f"SDPOTrainer: checkpoint {checkpoint} is not of a run with a stream: go on with the data as it was "
            "(without --stream)"
        )
    if not stream and kept is not None:
        raise ValueError(
            f"SDPOTrainer: checkpoint {checkpoint} is of a run with a stream: go on with one (--stream), as it was"
        )
    if not stream and before != step_size:
        raise ValueError(
            f"SDPOTrainer: checkpoint {checkpoint} was written by steps of {before} rows, got {step_size}; "
            f"it would go on at another place. global_batch_size={before} keeps them, for any number of processes; "
            "--set ignore_data_skip=true begins the data anew"
        )
    for name, value in order.items():
        was = found.get("order", {}).get(name, value)  # older ones do not say it
        if was != value:
            raise ValueError(
                f"SDPOTrainer: {name} must be {was}, as of checkpoint {checkpoint}, got {value}; the data would go on "
                "in another order, with rows trained twice or never. --set ignore_data_skip=true begins the data anew"
            )
    return kept


def shards_of(checkpoint: str | os.PathLike) -> int:
    """How many processes of DeepSpeed wrote a checkpoint; 0 for one without its files."""
    names = {path.name for path in Path(checkpoint).glob("global_step*/*_optim_states.pt")}
    return len({match[1] for name in names if (match := re.search(r"zero_pp_rank_(\d+)_", name))})
