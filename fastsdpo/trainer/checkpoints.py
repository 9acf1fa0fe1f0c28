"""Checkpoints that are whole: written aside, summed up, renamed; and found again when a run goes on.

    checkpoint-<step>/    a whole checkpoint; checksums.json holds size and CRC-32 of its files
    checkpoint.part/      one that is being written or deleted; never read

A checkpoint gets its name once everything in it is on the disk, so a run that is killed leaves whole
ones only. The checksums tell what a disk, a copy or a person changed afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from fastsdpo.data.locks import locked
from fastsdpo.prefix import whole_size
from fastsdpo.trainer.adapters import is_peft
from fastsdpo.trainer.card import write_card
from fastsdpo.trainer.optim import ADAMW
from fastsdpo.trainer.processes import agreed
from fastsdpo.trainer.teacher_weights import TeacherWeights

logger = logging.getLogger("fastsdpo.trainer")

TEACHER_FILE = "teacher_{}.safetensors"
CHECKSUMS = "checksums.json"
PART = "checkpoint.part"
LOCK = ".lock"  # in the output folder, while a run trains
BLOCK = 1 << 20


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns whatever a full or failing disk raises into an OSError that names ``what``."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        raise OSError(f"{what} cannot be written: {error}") from error


def check_output_folder(folder: str | os.PathLike, needed: int) -> None:
    """Finds out now whether a folder can be written to and has room for ``needed`` bytes.

    Raises:
        OSError: it cannot, or has not; the text says which.
    """
    with writing(f"the output folder {folder}"):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(BLOCK))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the output folder {folder} has {free / 1e6:,.0f} MB free, and what will be saved takes "
            f"at least {needed / 1e6:,.0f} MB"
        )


def check_saved_model(folder: str | os.PathLike) -> None:
    """Raises OSError where a folder holds no weights, of a model or of an adapter."""
    if not any(any(Path(folder).glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt")):
        raise OSError(f"the model was not saved: {folder} holds no weights")


def open_as_umask(folder: str | os.PathLike) -> None:
    """Gives files that only their owner can read, as safetensors writes them, the rights of any new file."""
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        (new := Path(probe, "new")).touch()
        mode = new.stat().st_mode & 0o777
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 == 0o600 != mode:
            path.chmod(mode)


def finish_checkpoint(part: Path, place: Path) -> None:
    """``part`` becomes the checkpoint ``place``, which it replaces."""
    open_as_umask(part)
    sums = {}
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        size, crc = _sum(path, sync=True)
        sums[path.relative_to(part).as_posix()] = {"bytes": size, "crc32": crc}
    with open(part / CHECKSUMS, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if place.exists():
        delete_checkpoint(place)
    os.replace(part, place)


def delete_checkpoint(place: Path) -> None:
    """Deletes it; a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    old = place.parent / PART / f"{place.name}.old"
    old.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    shutil.rmtree(old)


def delete_old_checkpoints(folder: Path, keep: int | None, best: str | None) -> None:
    """Deletes all but the newest ``keep`` checkpoints and the ``best``; None keeps all."""
    if keep is None or keep <= 0:
        return
    found = list_checkpoints(folder)
    protected = {place.name for place in found[-1:]} | ({Path(best).name} if best else set())
    spare = [place for place in found if place.name not in protected]
    wanted = max(keep, len(found) - len(spare))
    for place in spare[: max(0, len(found) - wanted)]:
        delete_checkpoint(place)


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The folders ``checkpoint-<step>``, oldest step first."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def damage_of(checkpoint: str | os.PathLike) -> str | None:
    """What differs from the checkpoint's checksums; None: nothing, or it has none to compare with.

    Reads every byte of it.
    """
    place = Path(checkpoint)
    try:
        sums = json.loads((place / CHECKSUMS).read_text("utf-8"))
        wanted = {name: (int(row["bytes"]), int(row["crc32"])) for name, row in sums.items()}
    except FileNotFoundError:
        return None  # written by another trainer, or by an older version of this one
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    for name, (size, crc) in wanted.items():
        path = place / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        try:
            if _sum(path)[1] != crc:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def shards_of(checkpoint: str | os.PathLike) -> int:
    """How many processes of DeepSpeed wrote a checkpoint; 0 for one without its files."""
    names = {path.name for path in Path(checkpoint).glob("global_step*/*_optim_states.pt")}
    return len({match[1] for name in names if (match := re.search(r"zero_pp_rank_(\d+)_", name))})


class FoundCheckpoint(NamedTuple):
    """The newest whole checkpoint, and sentences about the newer ones that are damaged."""

    path: str | None
    damaged: list[str]


def find_checkpoint(folder: str | os.PathLike) -> FoundCheckpoint:
    """The newest checkpoint of a run that is whole."""
    damaged = []
    for place in reversed(list_checkpoints(folder)):
        problem = damage_of(place)
        if problem is None:
            return FoundCheckpoint(str(place), damaged)
        damaged.append(f"checkpoint {place} is damaged: {problem}")
    return FoundCheckpoint(None, damaged)


def _sum(path: Path, sync: bool = False) -> tuple[int, int]:
    """``(bytes, CRC-32)`` of a file, which is on the disk afterwards where ``sync``."""
    size = crc = 0
    with open(path, "r+b" if sync else "rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return size, crc


class CheckpointTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that are whole, or not there.

    What is overridden, and why:

        _save_checkpoint    writes aside, sums up, renames; deletes older ones afterwards
        _save               a model card; no pickle; files that others may read
        save_model          the whole weights, however they are sharded
        _save_optimizer_and_scheduler, _load_optimizer_and_scheduler    the teacher's weights as well
    """

    _writing_checkpoint = False

    def teacher_copies(self) -> dict[str, TeacherWeights]:
        """By name, the weights beside the model's that a checkpoint holds; for subclasses."""
        return {}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for name, weights in self.teacher_copies().items():
            weights.save(os.path.join(output_dir, TEACHER_FILE.format(name)), write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for name, weights in self.teacher_copies().items():
                weights.load(os.path.join(checkpoint, TEACHER_FILE.format(name)))

    def save_state_to(self, folder: str) -> None:
        """Model, optimizer, scheduler and teacher into a folder, outside `train`."""
        self.save_model(folder)
        self._save_optimizer_and_scheduler(folder)

    def load_state_from(self, folder: str) -> None:
        """What `save_state_to` wrote."""
        self._load_from_checkpoint(folder)
        self._load_optimizer_and_scheduler(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """With a card, and without the pickle of the settings, which nothing reads and which loads as code."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            write_card(self, folder)
            open_as_umask(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model (or adapter) and the tokenizer, for ``from_pretrained``.

        Under FSDP the weights are gathered to the first process, whatever kind of state dict its
        checkpoints have (transformers writes none where that kind is sharded).

        Raises:
            OSError: nothing that holds weights was written.
        """
        if self.is_fsdp_enabled and not _internal_call:
            folder = output_dir or self.args.output_dir
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            check_saved_model(output_dir or self.args.output_dir)

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PART) if self._writing_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A whole checkpoint, or OSError and none; the older ones go once it is there."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        part = folder / PART
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best.exists():
                self.state.best_model_checkpoint = str(best)
        self._writing_checkpoint = True
        try:
            with writing(f"{folder / name}"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if self.state.best_global_step == self.state.global_step:
                        self.state.best_model_checkpoint = str(folder / name)
                        self.state.save_to_json(str(part / name / "trainer_state.json"))
                    finish_checkpoint(part / name, folder / name)
                    best_one = self.state.best_model_checkpoint
                    delete_old_checkpoints(folder, self.args.save_total_limit, best_one)
        finally:
            self._writing_checkpoint = False
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_before_stop(self) -> str:
        """Saves the state after the last whole step; a sentence that says where.

        For what is found during a step, before the optimizer has changed anything.
        """
        if self.state.global_step == 0:
            return "No step was taken before"
        place = os.path.join(self._get_output_dir(), f"checkpoint-{self.state.global_step}")
        if not os.path.isdir(place):
            self._save_checkpoint(self.model)
        return f"The state before it is in {place}"

    def check_output(self, *, model: bool = False) -> None:
        """Finds out now whether the output folder can take a checkpoint (and the trained model).

        Raises:
            OSError: it cannot be written to, or has less room than these take at the least.
        """
        if not self.args.should_save:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        saved = _bytes(trained) if is_peft(self.model) else _bytes(self.model.parameters())
        needed = saved if model else 0
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            moments = str(getattr(self.args.optim, "value", self.args.optim)) in ADAMW
            teachers = sum(teacher.bytes for teacher in self.teacher_copies().values())
            needed += saved + teachers + (2 * _bytes(trained) if moments else 0)
        check_output_folder(self.args.output_dir, needed)

    @contextmanager
    def output_folder_locked(self) -> Iterator[None]:
        """No other run trains into the output folder meanwhile.

        Raises:
            FileExistsError: one does; raised in all processes.
        """
        with ExitStack() as stack:
            taken = None
            if self.args.process_index == 0:
                folder = self.args.output_dir
                os.makedirs(folder, exist_ok=True)
                try:
                    said = f"another run is training into {folder}; wait for its end, stop it, or take another folder"
                    stack.enter_context(locked(os.path.join(folder, LOCK), wait=False, taken=said))
                except FileExistsError as error:
                    taken = str(error)
            taken = agreed(taken)
            if taken is not None:
                raise FileExistsError(taken)
            yield

    def find_checkpoint(self) -> str | None:
        """The newest whole checkpoint of the output folder, the same in all processes.

        Damaged ones are named in a warning.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        first = self.args.process_index == 0
        path, damaged = agreed(find_checkpoint(self.args.output_dir) if first else None)
        if path is None and damaged:
            raise ValueError(f"SDPOTrainer: no checkpoint is whole: {'; '.join(damaged)}")
        if first:
            for problem in damaged:
                logger.warning("%s; going on from %s", problem, path)
        return path

    def check_checkpoint(self, checkpoint: str | os.PathLike) -> None:
        """Raises ValueError, in all processes, where the checkpoint is damaged or DeepSpeed cannot go on from it."""
        problem = agreed(damage_of(checkpoint) if self.args.process_index == 0 else None)
        if problem is not None:
            raise ValueError(f"SDPOTrainer: checkpoint {checkpoint} is damaged: {problem}")
        written_by = agreed(shards_of(checkpoint) if self.args.process_index == 0 else None)
        if self.is_deepspeed_enabled and written_by not in (0, self.args.world_size):
            raise ValueError(
                f"SDPOTrainer: checkpoint {checkpoint} was written by {written_by} processes of DeepSpeed, which go "
                f"on as {written_by}, got {self.args.world_size}"
            )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(whole_size(tensor) * tensor.element_size() for tensor in tensors)
