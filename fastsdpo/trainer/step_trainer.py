"""The training step of SDPO on `transformers.Trainer`, wherever the interactions come from.

    micro-batch   what the data loader gives to one process at once
    pack          interactions of a micro-batch that share one forward pass
    pass          a forward pass over a pack: the student's, and in it or before it the teacher's

One optimizer step: micro-batches -> packs -> a pass of student and teacher -> loss, statistics, gradients;
then the check that all is finite, the optimizer, and the teacher's moving average.

What `StepTrainer` overrides of `transformers.Trainer`, and why:

    get_batch_samples     counts the global batch before its first micro-step
    training_step         a micro-batch in packs of bounded size
    compute_loss          the objective
    create_optimizer      AdamW that keeps small steps in bfloat16
    evaluate              leaves no loader behind, and the model to be wrapped for training
    log                   the statistics of the signal

Checkpoints are `CheckpointTrainer`'s. `SDPOTrainer` adds logged interactions, `OnlineSDPOTrainer` a user's
reactions to sampled answers; chat takes single steps (`StepTrainer.update`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastsdpo.data import InteractionTokenizer, TokenizedInteraction
from fastsdpo.data.chat_template import reads_clock
from fastsdpo.data.templates import AUTO, choose_template
from fastsdpo.prefix import check_head, check_passes, gathered_layers, is_wrapped, whole_size
from fastsdpo.trainer.callbacks import EpochOrder, LongWarmUp, MovingAverage, SignalWindow
from fastsdpo.trainer.checkpoints import CheckpointTrainer
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.finite import FiniteCheck
from fastsdpo.trainer.finite import NonFiniteError as NonFiniteError
from fastsdpo.trainer.launch import check_engine
from fastsdpo.trainer.leaks import check_held_out
from fastsdpo.trainer.learner import Learner
from fastsdpo.trainer.loss import TokenStatistics
from fastsdpo.trainer.metrics import SignalMetrics
from fastsdpo.trainer.model import CHECKPOINTING, choose_checkpointing, prepare_model
from fastsdpo.trainer.noise import check_noise
from fastsdpo.trainer.optim import check_arguments, check_given, optimizer_class
from fastsdpo.trainer.packs import collate
from fastsdpo.trainer.processes import agreed, gather_values, reduce_sum
from fastsdpo.trainer.requests import check_batches, check_metric
from fastsdpo.trainer.sharing import PrefixSharing
from fastsdpo.trainer.speed import SpeedMeter
from fastsdpo.trainer.teacher_weights import TeacherWeights
from fastsdpo.trainer.template_date import keep_date, run_date
from fastsdpo.trainer.ulysses import make_ulysses

logger = logging.getLogger("fastsdpo.trainer")


class StepTrainer(CheckpointTrainer):
    """What a step of SDPO is, wherever its interactions come from. For subclasses; see `SDPOTrainer`.

    Attributes:
        learner: teacher, sharing and loss.
        tokenize: text to `TokenizedInteraction`; None without a tokenizer.
        metrics: the signal's statistics since the last log.
    """

    args: SDPOConfig
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: SDPOConfig,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        peft_config: Any,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Any, Any],
    ):
        module, processing_class = prepare_model(model, args, processing_class, peft_config)
        check_given(optimizers[0], module)
        check_arguments(args, module)
        if choose_checkpointing(args, module, args.device.type):
            logger.info("%s", CHECKPOINTING)
        if args.template == AUTO:
            args.template = choose_template(args.template, sum(map(whole_size, module.parameters())))
            logger.info("hindsight template: %s, by the size of the model (--template names another)", args.template)
        self.tokenize: InteractionTokenizer | None = None
        if processing_class is not None:
            if reads_clock(processing_class, args.chat_template_kwargs):  # type: ignore[arg-type]
                args.chat_template_date = run_date(args)
            self.tokenize = InteractionTokenizer(processing_class, args.template, **args.tokenizer_options())
        self.args, self.processing_class = args, processing_class
        train_dataset = self.make_dataset(train_dataset, "train_dataset")
        eval_dataset = self.make_dataset(eval_dataset, "eval_dataset")
        check_held_out(args, train_dataset, eval_dataset)
        super().__init__(
            model=module,
            args=args,
            data_collator=self.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is normalized by num_items_in_batch, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        check_engine(self.args, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        with gathered_layers(self.model):
            self.learner = self._make_learner()
        if type(self).collate is StepTrainer.collate and self.args.ulysses == 1:
            self.data_collator = self.learner.maker.collate  # which makes packs too, in the loader's workers
        self.sampler: Any = None
        self.metrics = self.new_metrics()
        self.speed = SpeedMeter.of(self.model, args)
        self.finite = FiniteCheck(self)
        windows, order = SignalWindow(self.metrics, self.speed), EpochOrder(lambda: self.sampler)
        for callback in (self.finite, MovingAverage(self.learner), windows, order, LongWarmUp()):
            self.add_callback(callback)

    def _make_learner(self) -> Learner:
        """Once the model is where it trains; what it cannot do is refused here, by name."""
        good, reason = agreed(check_head(self.model))
        if not good:
            raise NotImplementedError(f"SDPOTrainer: the model's head is not supported: {reason}")
        good, reason = agreed(check_passes(self.model))
        if not good:
            raise NotImplementedError(f"SDPOTrainer: the model is not supported: {reason}")
        noisy = agreed(check_noise(self.model, disable_dropout=self.args.disable_dropout))
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        datasets = (self.train_dataset, *held_out.values())
        engine = getattr(self.accelerator.state, "deepspeed_plugin", None)
        in_shards = self.is_fsdp_enabled or (engine is not None and engine.zero_stage == 3)
        sharing = PrefixSharing(
            self.model,
            self.args,
            noisy,
            datasets,
            one_pass=self.is_deepspeed_enabled,
            in_step=in_shards,
            around=self.accelerator.autocast,
        )
        return Learner(
            self.model,
            self.args,
            sharing,
            unwrapped=lambda: self.accelerator.unwrap_model(self.model),
            sharded=("fsdp2" if self.is_fsdp_enabled else "zero3") if in_shards else None,
            ulysses=make_ulysses(self.args),
        )

    # ------------------------------------------------------------------------- what subclasses say

    collate: Any = staticmethod(collate)
    batch_of = "interactions"  # what the loader's micro-batches have lists of

    def make_dataset(self, source: Any, name: str) -> Any:
        """The dataset of an argument, which is None, a source, or a dict of sources."""
        raise NotImplementedError

    def prepare_batches(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of one optimizer step with their ``interactions``."""
        return batches

    def idle_interaction(self) -> TokenizedInteraction:
        """What a process without interactions runs the model on, with weight 0."""
        raise NotImplementedError

    def pass_options(self, pack: Sequence[TokenizedInteraction]) -> dict[str, Any]:
        """Arguments of `sdpo_step_loss` that may depend on the interactions of a pass."""
        return {"is_clip": self.args.is_clip}

    def figures_of(self, held_out: Any) -> Collection[str]:
        """The names of what an evaluation of a dataset reports, without a prefix."""
        raise NotImplementedError

    def before_training(self, checkpoint: str | None) -> None:
        check_metric(self.args.metric_for_best_model, self.eval_dataset, self.figures_of)
        keep_date(self.args, checkpoint)

    # ------------------------------------------------------------------------------- one step

    @property
    def sharing(self) -> str:
        """The sharing in use: "conversation", "interaction" or "off"."""
        return self.learner.sharing.level

    @property
    def sharded(self) -> bool:
        """Whether the processes have to run the model equally often, to gather its weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def speaks(self) -> bool:
        """Whether this process counts and reports its packs: the first of those that share them (``ulysses``)."""
        return self.learner.ulysses is None or self.learner.ulysses.rank == 0

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing, as a loss or gradient was not finite."""
        return self.finite.skipped

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and S or N over all of them and all processes."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # goes on from its last checkpoint; transformers would take one step more
        with self.speed.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        check_batches(batches, self.batch_of)
        batches = self.prepare_batches(batches)
        ulysses = self.learner.ulysses
        if ulysses is not None:  # the processes of a group take each other's interactions
            batches = [{"interactions": ulysses.join(batch["interactions"])} for batch in batches]
        packs = [len(self.learner.ready(batch, device)) for batch in batches]
        items = sum(self.learner.count(batch["interactions"]) for batch in batches) if self.speaks else 0
        if self.args.world_size == 1:
            self.finite.items = torch.tensor(items, device=device)
            return batches, self.finite.items
        counted: Any = self.accelerator.gather(torch.tensor([[items, *packs]], device=device))
        if self.sharded:
            for batch, passes in zip(batches, counted[:, 1:].amax(0).tolist()):
                batch["passes"] = passes
        self.finite.items = counted[:, 0].sum()
        return batches, self.finite.items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss of a micro-batch; its gradient is added, pack by pack."""
        if self.args.world_size > 1 and not is_wrapped(model):
            raise RuntimeError(
                f"SDPOTrainer: with {self.args.world_size} processes the model must be wrapped by DDP, "
                f"FSDP or DeepSpeed, got {type(model).__name__}: each process would train a model of "
                "its own. Was it prepared before train()?"
            )
        packs = self.learner.ready(inputs, self.args.device)
        # A process without interactions (at the end of an epoch), or with fewer passes than another,
        # runs the model all the same, with weight 0.
        empty = max(1, inputs.get("passes", 0)) - len(packs)
        passes: list[tuple[Any, Any]] = [(pack, num_items_in_batch) for pack in packs]
        if empty > 0:
            passes += [([self.idle_interaction()], None)] * empty
        losses = []
        for number, (pack, divisor) in enumerate(passes):
            last = number == len(passes) - 1
            # Before a step's last micro-batch transformers is in no_sync already, and FSDP2's cannot be nested.
            syncs = last or self.args.sync_each_pass or not self.accelerator.sync_gradients
            with nullcontext() if syncs else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, {"interactions": pack}, divisor))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one pack; without ``num_items_in_batch`` it weighs nothing.

        Times the number of processes, since their gradients are averaged afterwards.
        """
        pack = inputs["interactions"]
        if num_items_in_batch is None:
            loss, statistics = self.run_pass(model, pack, 1, divided=True)
            loss = loss * 0.0
        else:
            loss, statistics = self.run_pass(model, pack, num_items_in_batch, divided=True)
            self.speed.add(statistics, 1 if self.learner.ulysses is None else self.learner.ulysses.size)
            self.metrics.add(pack, statistics, self.speaks)
            self.finite.add(pack, statistics.sequence_loss)
            loss = loss * self.accelerator.num_processes
        if self.is_deepspeed_enabled:  # whose backward pass takes the step as well
            self.finite.before_backward()
        return (loss, statistics) if return_outputs else loss

    def run_pass(
        self,
        model: nn.Module,
        interactions: Sequence[TokenizedInteraction],
        num_items: int | float | Tensor,
        **options: Any,
    ) -> tuple[Tensor, TokenStatistics]:
        """`Learner.run_pass` with what the interactions need."""
        return self.learner.run_pass(model, interactions, num_items, **self.pass_options(interactions), **options)

    def update(self, interactions: Sequence[TokenizedInteraction]) -> dict[str, float]:
        """One optimizer step on these interactions, outside `train` and with all that a step in it does.

        The optimizer is made before (`create_optimizer_and_scheduler`); its learning rate stays as it is.

        Returns:
            The loss and the statistics of the signal, as they are logged.

        Raises:
            NonFiniteError: loss or gradient are not finite; the model is as before.
            NotImplementedError: with several processes, FSDP or DeepSpeed.
        """
        if self.args.world_size > 1 or self.sharded:
            raise NotImplementedError("SDPOTrainer: update() takes one process without FSDP or DeepSpeed; use train()")
        hooks: Any = self.args, self.state, self.control
        self.finite.on_step_begin(*hooks)
        try:
            inputs, items = {"interactions": list(interactions)}, self.learner.count(interactions)
            self.finite.items = torch.tensor(items)
            loss = self.training_step(self.model, inputs, items)
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.finite.on_pre_optimizer_step(*hooks)
            assert self.optimizer is not None
            self.optimizer.step()
        finally:
            self.model.zero_grad()
        self.learner.after_step()
        self.state.global_step += 1
        return {"loss": float(loss), **self.flush_metrics()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        given = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        chosen = optimizer_class(self.args, self.model, given)
        if chosen is not None:
            self.optimizer_cls_and_kwargs = chosen
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def teacher_copies(self) -> dict[str, TeacherWeights]:
        return self.learner.copies

    # ---------------------------------------------------------------- evaluation, logs, the run

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; before training too, but not under FSDP2 or DeepSpeed.

        The loader that it prepares is not kept: accelerate holds on to each of them, and with it to
        the indices of the whole set. Nor is what marks the model as prepared: accelerate would
        return it as it is when training begins, and nothing would average the gradients of several
        processes (accelerate 1.15).

        Raises:
            NotImplementedError: before training under FSDP2 or DeepSpeed, which take a model only
                together with its optimizer.
        """
        accelerator, model = self.accelerator, self.model
        first = not accelerator._models and not self.is_in_train
        if first and (self.is_deepspeed_enabled or getattr(accelerator, "is_fsdp2", False)):
            engine = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP2"
            raise NotImplementedError(
                f"SDPOTrainer: evaluate() before train() is not possible under {engine}; set "
                "eval_on_start=True, which evaluates before the first step"
            )
        loaders, forward = len(accelerator._dataloaders), vars(model).get("forward")
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.__dict__.pop("_eval_dataloaders", None)  # transformers would take them for other sets too
            del accelerator._dataloaders[loaders:]
            if first and not self.sharded:
                accelerator._models.clear()
                for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
                    vars(model).pop(name, None)
                if forward is not None:
                    vars(model)["forward"] = forward

    def new_metrics(self) -> SignalMetrics:
        return SignalMetrics(
            reference_kl=self.args.reference_kl > 0,
            divergence=self.args.mode != "sampled_token",
            end_id=None if self.tokenize is None else self.tokenize.end_of_turn_id,
        )

    def flush_metrics(self) -> dict[str, float]:
        """The signal's statistics since the last call, over all processes."""
        return self.metrics.flush(reduce_sum=self.reduce_sum, gather=self.gather_values)

    def reduce_sum(self, values: Tensor) -> Tensor:
        return reduce_sum(self.accelerator, values)

    def gather_values(self, values: Tensor) -> Tensor:
        return gather_values(self.accelerator, values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs.update({**self.flush_metrics(), **self.speed.flush(self.gather_values)})
            if self.args.non_finite == "skip":
                logs["sdpo/skipped_steps"] = float(self.skipped_steps)
        super().log(logs, start_time)
