"""One date for the whole run, where the chat template reads a clock; kept for when the run goes on."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

DATE_FILE = "chat_template_date.json"  # beside the checkpoints


def run_date(args: Any) -> str:
    """The date that the run's chat template reads, the same in all processes and when it goes on.

    As set, or that of the run in the output folder, or now.
    """
    folder = Path(args.output_dir)
    date: list[Any] = [args.chat_template_date]
    if date[0] is None and args.process_index == 0:
        kept = _kept_date(folder) if any(folder.glob("checkpoint-*")) else None
        date = [kept or datetime.now().isoformat(timespec="seconds")]
    if args.world_size > 1:
        broadcast_object_list(date)
    return str(date[0])


def keep_date(args: Any, checkpoint: str | os.PathLike | None = None) -> None:
    """Writes the date for when the run goes on; or compares it with that of a checkpoint's run.

    Raises:
        ValueError: they differ, so that the run would go on with other tokens.
    """
    date = args.chat_template_date
    if date is None:
        return
    if checkpoint is None:
        if args.process_index == 0:
            os.makedirs(args.output_dir, exist_ok=True)
            Path(args.output_dir, DATE_FILE).write_text(json.dumps({"date": date}), "utf-8")
        return
    kept = _kept_date(Path(checkpoint).parent)
    if kept not in (None, date):
        raise ValueError(
            f"SDPOTrainer: chat_template_date must be {kept!r}, as in the run of {checkpoint}, got "
            f"{date!r}: the chat template reads a clock"
        )


def _kept_date(folder: Path) -> str | None:
    place = folder / DATE_FILE
    if not place.exists():
        return None
    try:
        date = json.loads(place.read_text("utf-8"))["date"]
        datetime.fromisoformat(date)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"SDPOTrainer: {place} must hold a date, got {error!r}") from None
    return date
