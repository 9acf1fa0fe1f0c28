"""Checkpoints that are whole: written aside, summed up, renamed; and found again when a run goes on.

A checkpoint gets its name once everything in it is on the disk, so a run that is killed leaves whole
ones only. The checksums tell what a disk, a copy or a person changed afterwards.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from fastsdpo.data.locks import locked
from fastsdpo.prefix import whole_size
from fastsdpo.trainer.adapters import is_peft, warning_of_base
from fastsdpo.trainer.callbacks import BestCheckpoint, WrittenCheckpoint
from fastsdpo.trainer.card import write_card
from fastsdpo.trainer.checkpoint_folders import (
    PART,
    check_output_folder,
    check_saved_model,
    delete_old_checkpoints,
    find_checkpoint,
    finish_checkpoint,
    list_checkpoints,
    writing,
)
from fastsdpo.trainer.checksums import Recorder, damage_of
from fastsdpo.trainer.file_rights import open_as_umask
from fastsdpo.trainer.optim import ADAMW, OptimizerSettings
from fastsdpo.trainer.place import check_state, read_place, shards_of, write_place
from fastsdpo.trainer.processes import agreed, gather_list
from fastsdpo.trainer.requests import NO_SEARCH
from fastsdpo.trainer.stream import InteractionStream
from fastsdpo.trainer.teacher_weights import TeacherWeights

logger = logging.getLogger("fastsdpo.trainer")

TEACHER_FILE = "teacher_{}.safetensors"
LOCK = ".lock"  # in the output folder, while a run trains


class _Pending(NamedTuple):
    """A checkpoint of which files may still be written, and the folder that it will be in."""

    recorder: Recorder
    folder: Path
    name: str


class CheckpointTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that are whole, or not there.

    What is overridden, and why:

        train               looks at the output folder and the checkpoint first
        _save_checkpoint    writes aside, sums up, renames; deletes older ones afterwards
        _save               a model card; no pickle; files that others may read
        save_model          the whole weights, however they are sharded
        _save_optimizer_and_scheduler, _load_optimizer_and_scheduler    the teacher's weights as well; the place in
                            the data, which `train` looks at first
    """

    _writing_checkpoint = False
    _pending: _Pending | None = None
    _writers: Sequence[Any] = ()  # the groups of `Recorder`

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(BestCheckpoint())
        if self.args.async_checkpoints:
            self.add_callback(WrittenCheckpoint(self.finish_checkpoint))

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: a trainer is made for its settings."""
        raise NotImplementedError(NO_SEARCH)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As `transformers.Trainer.train`, after a look at the output folder and the checkpoint.

        Args:
            resume_from_checkpoint: a folder; or True: the output folder's newest whole checkpoint.
            trial: must be None (NotImplementedError).

        Raises:
            OSError: the output folder cannot take a checkpoint, at the start or later; or another run is
                training into it (FileExistsError).
            ValueError: the checkpoint is damaged, there is none, or it is of other data; a setting does not fit.
            NonFiniteError: a loss or gradient is not finite (``non_finite="stop"``).
        """
        if trial is not None:
            raise NotImplementedError(NO_SEARCH)
        if self.args.save_strategy != "no":
            self.check_output()
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        place = None
        if checkpoint is not None:
            check_state(checkpoint)
            if not self.args.ignore_data_skip:
                place = read_place(checkpoint, self.step_size, self.data_order(), stream=self.stream is not None)
            if warning := warning_of_base(self.model, checkpoint):
                logger.warning("%s", warning)
        with self.output_folder_locked():
            self.before_training(checkpoint)
            if self.stream is not None:
                self.stream.begin(place)
            output = super().train(checkpoint, None, ignore_keys_for_eval)
            self.finish_checkpoint()
            if self.args.should_save and checkpoint is not None:  # what a run left that was killed as it deleted
                folder = Path(self.args.output_dir)
                delete_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
                shutil.rmtree(folder / PART, ignore_errors=True)
        return output

    def _checkpoint_of(self, asked: str | bool | None) -> str | None:
        """The whole checkpoint that `train` was asked to go on from; None: it begins."""
        if asked is True:
            if (found := self.find_checkpoint()) is None:
                raise ValueError(f"SDPOTrainer: {self.args.output_dir} holds no checkpoint")
            return found
        if not asked:
            return None
        self.check_checkpoint(asked)
        return asked

    def before_training(self, checkpoint: str | None) -> None:
        """Called by `train` once it is clear that it can begin, or go on from a checkpoint; for subclasses."""

    @property
    def step_size(self) -> int:
        """What an optimizer step takes of the data, over all processes."""
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    @property
    def stream(self) -> InteractionStream | None:
        """What is trained on, where it is a stream."""
        return self.train_dataset if isinstance(self.train_dataset, InteractionStream) else None

    def data_order(self) -> dict[str, Any]:
        """What decides the order of data that lies there, by the names of settings; for subclasses."""
        return {}

    def teacher_copies(self) -> dict[str, TeacherWeights]:
        """By name, the weights beside the model's that a checkpoint holds; for subclasses."""
        return {}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for name, weights in self.teacher_copies().items():
            weights.save(os.path.join(output_dir, TEACHER_FILE.format(name)), write=self.args.should_save)
        if self.args.should_save:
            stream = None if self.stream is None else self.stream.state(self.state.global_step)
            write_place(output_dir, self.step_size, self.data_order(), stream)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        settings = OptimizerSettings.of(self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            settings.restore(self.lr_scheduler)
            self._load_teachers(checkpoint)

    def _load_teachers(self, checkpoint: str) -> None:
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
        """A whole checkpoint, or OSError and none; the older ones go once it is there.

        With ``async_checkpoints`` it is whole when `finish_checkpoint` has been called.
        """
        self.finish_checkpoint()
        self._check_room()
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        part = folder / PART
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.async_checkpoints and not self._writers:  # of the model's shards and of the optimizer's
            self._writers = [torch.distributed.new_group(backend="gloo") for _ in range(2)]
        recorder = Recorder(self._writers)
        self._writing_checkpoint = True
        try:
            with writing(f"{folder / name}"), recorder.recording():
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save and self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(folder / name)
                    self.state.save_to_json(str(part / name / "trainer_state.json"))
            self._pending = _Pending(recorder, folder, name)
        finally:
            self._writing_checkpoint = False
            if self.args.should_save and self._pending is None:
                shutil.rmtree(part, ignore_errors=True)
        if not self.args.async_checkpoints:
            self.finish_checkpoint()

    def finish_checkpoint(self, *, wait: bool = True) -> None:
        """Makes whole the checkpoint that was saved last, where it is not yet. All processes must call it.

        Args:
            wait: False: only where all processes have written their files.

        Raises:
            OSError: it cannot be written, and is not there.
        """
        if self._pending is None or not (wait or all(gather_list([self._pending.recorder.done]))):
            return
        (recorder, folder, name), self._pending = self._pending, None
        part = folder / PART / name
        try:
            with writing(f"{folder / name}"):
                recorder.wait()
                paths = {path.removesuffix(".part"): sum for path, sum in recorder.sums.items()}  # renamed since
                own = {Path(os.path.relpath(path, part)).as_posix(): sum for path, sum in paths.items()}
                written = {name: sum for sums in gather_list([own]) for name, sum in sums.items()}
                if self.args.should_save:
                    finish_checkpoint(part, folder / name, written)
                    best_one = self.state.best_model_checkpoint
                    delete_old_checkpoints(folder, self.args.save_total_limit, best_one)
        finally:
            if self.args.should_save:
                shutil.rmtree(folder / PART, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Raises ValueError where the checkpoint is of another model, or of another adapter."""
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (RuntimeError, ValueError) as error:  # other shapes; an adapter in the place of a model, or the reverse
            lines = str(error).splitlines()
            differ = [line.strip() for line in lines if "size mismatch" in line or "Can't find a" in line]
            if not differ:
                raise
            raise ValueError(
                f"SDPOTrainer: checkpoint {resume_from_checkpoint} is of another model or adapter; go on with the "
                f"--model and --lora that it was begun with, or take another output folder ({differ[0]})"
            ) from error

    def _load_best_model(self) -> None:
        self.finish_checkpoint()
        super()._load_best_model()
        if not self.args.save_only_model:  # else no teacher moves
            self._load_teachers(self.state.best_model_checkpoint)

    def save_before_stop(self) -> str:
        """Saves the state after the last whole step; a sentence that says where.

        For what is found during a step, before the optimizer has changed anything.
        """
        self.finish_checkpoint()
        if self.state.global_step == 0:
            return "No step was taken before"
        place = os.path.join(self._get_output_dir(), f"checkpoint-{self.state.global_step}")
        if not os.path.isdir(place):
            self._save_checkpoint(self.model)
            self.finish_checkpoint()
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

    def _check_room(self) -> None:
        """Raises OSError in all processes where the next checkpoint has no room."""
        problem = None
        try:
            self.check_output()
        except OSError as error:
            problem = str(error)
        if (problem := agreed(problem)) is not None:
            raise OSError(f"checkpoint-{self.state.global_step} cannot be written: {problem}")

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
            if (taken := agreed(taken)) is not None:
                raise FileExistsError(taken)
            yield

    def find_checkpoint(self) -> str | None:
        """The newest whole checkpoint of the output folder, the same in all processes.

        Damaged ones are named in a warning.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        first = self.args.process_index == 0
        places = agreed(list_checkpoints(self.args.output_dir)[::-1] if first else None)
        path, damaged = find_checkpoint(places, self._damage_of)
        if path is None and damaged:
            raise ValueError(f"SDPOTrainer: no checkpoint is whole: {'; '.join(damaged)}")
        if first:
            for problem in damaged:
                logger.warning("%s; going on from %s", problem, path)
        return path

    def _damage_of(self, checkpoint: str | os.PathLike) -> str | None:
        """`damage_of`, each process with its share of the files."""
        found = gather_list([damage_of(checkpoint, self.args.process_index, self.args.world_size)])
        return next((problem for problem in found if problem is not None), None)

    def check_checkpoint(self, checkpoint: str | os.PathLike) -> None:
        """Raises ValueError, in all processes, where the checkpoint is damaged or DeepSpeed cannot go on from it."""
        problem = self._damage_of(checkpoint)
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
