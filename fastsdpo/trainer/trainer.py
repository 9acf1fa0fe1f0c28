"""`SDPOTrainer`: the training step of `StepTrainer` on logged interactions.

It adds the data to the step: its order, the check for leaks, the evaluation on held-out interactions, and a look at
what the follow-ups do before training.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import gathered_layers, is_partitioned, is_wrapped, training_mode
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset, Reading
from fastsdpo.trainer.finite import NonFiniteError as NonFiniteError
from fastsdpo.trainer.leaks import check_held_out
from fastsdpo.trainer.measures import HeldOutMeasures, summary
from fastsdpo.trainer.measures_sample import MeasuredInteraction, sample_measured
from fastsdpo.trainer.metrics import SignalMetrics
from fastsdpo.trainer.packs import GroupSampler
from fastsdpo.trainer.step_trainer import StepTrainer
from fastsdpo.trainer.stream import InteractionStream, StepShare, StreamSteps
from fastsdpo.trainer.teacher_check import TeacherCheck, teacher_check

logger = logging.getLogger("fastsdpo.trainer")


class SDPOTrainer(StepTrainer):
    """Trains a causal language model on logged interactions.

    Args:
        model: a transformers causal LM (or PEFT's), or a name that `load_model_and_tokenizer`
            takes: a folder, a GGUF file or a hub id. By name, it has the dtype of
            ``SDPOConfig.dtype``: the checkpoint's on a GPU, float32 on a CPU.
        args: the settings.
        train_dataset: a path to interactions, or a collection of `Interaction`,
            `TokenizedInteraction` or rows as `fastsdpo prepare` writes them. A
            `torch.utils.data.IterableDataset` of these (`datasets.IterableDataset` is one) and an
            `InteractionStream` are read while training goes on; they need ``max_steps``.
        eval_dataset: the same, held out; or a dict of several.
        processing_class: the tokenizer; None: the one that comes with a model given by name.
        peft_config: of a new adapter to train (`peft.LoraConfig`, ...); None where the model is an
            adapter on its base already (the folder of one, a `peft.PeftModel`): training goes on.
        callbacks, optimizers: as in `transformers.Trainer`.

    Attributes:
        measured_rows: the measures of each held-out interaction at the last evaluation of ``eval_dataset``.

    Raises:
        TypeError, ValueError: a setting or dataset is unusable; the text says which and why. So is
            held-out data of which a conversation is trained on (see `SDPOConfig.allow_leaks`).
        NotImplementedError: the model's head, its kind of adapter or a sharing asked for by name
            cannot be computed, a noise that ``disable_dropout`` cannot turn off, or a teacher that
            this kind of distributed training cannot hold.
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: SDPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = SDPOConfig(output_dir="sdpo_output") if args is None else args
        if not isinstance(args, SDPOConfig):
            raise TypeError(f"SDPOTrainer: args must be an SDPOConfig, got {type(args).__name__}")
        self.measures: HeldOutMeasures | None = None
        self.measured_rows: list[dict[str, Any]] = []
        self._measures_of: InteractionDataset | None = None
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, optimizers
        )
        if self.stream is not None:
            self.stream.by_conversation = self.by_conversation

    def make_dataset(self, source: Any, name: str) -> Any:
        if source is None:
            return None
        if isinstance(source, dict) and name != "train_dataset":
            return {key: self.make_dataset(value, f"{name}[{key!r}]") for key, value in source.items()}
        args = self.args
        progress = not args.disable_tqdm and args.process_index == 0
        tokenizer, options = self.processing_class, args.tokenizer_options()
        if name == "train_dataset" and isinstance(source, (InteractionStream, IterableDataset)):
            stream = source if isinstance(source, InteractionStream) else InteractionStream(source)
            stream.open(Reading(tokenizer, args.template, name, options, False), args)
            return stream
        if name == "train_dataset" and args.shuffle_buffer is not None:
            raise ValueError("SDPOTrainer: shuffle_buffer needs a train_dataset that is a stream (--stream)")
        options |= {"cache": args.token_cache, "workers": args.tokenizer_workers}
        dataset = InteractionDataset.from_source(
            source, tokenizer, args.template, name=name, progress=progress, **options
        )
        if name != "train_dataset" and not dataset.measured:
            count = args.measure_interactions
            dataset.measured = sample_measured(source, count) or [
                MeasuredInteraction(item) for item in dataset.sample[:count]
            ]
        return dataset

    def idle_interaction(self) -> TokenizedInteraction:
        return self.train_dataset[0] if self.stream is None else self.stream.idle

    @property
    def by_conversation(self) -> bool:
        """Whether a conversation's interactions stay together in the order."""
        grouped = self.args.group_by_conversation
        return self.sharing == "conversation" if grouped is None else grouped

    def data_order(self) -> dict[str, Any]:
        if self.stream is not None or self.train_dataset is None:
            return {}  # a stream's is in its state
        args = self.args
        return {
            "data_seed": args.order_seed,
            "group_by_conversation": self.by_conversation,
            "the number of interactions": len(self.train_dataset),
        }

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        self.sampler = GroupSampler(
            dataset.groups(self.by_conversation),
            each=self._train_batch_size,
            processes=args.world_size,
            accumulated=args.gradient_accumulation_steps,
            costs=dataset.costs(self.sharing) if args.world_size > 1 else None,
            seed=args.order_seed,
        )
        return self.sampler

    # ------------------------------------------------------------------------------- a stream

    def get_train_dataloader(self) -> Any:
        """Of a stream a loader that accelerate does not divide: each process's micro-batches are its own already."""
        stream, args = self.stream, self.args
        if stream is None:
            return super().get_train_dataloader()

        def begun() -> tuple[int, int]:
            step = self.state.global_step
            return step, step % self.state.max_steps if stream.resumed else 0

        def check(interactions: InteractionDataset) -> None:
            self.learner.sharing.check(interactions)
            check_held_out(args, interactions, self.eval_dataset)

        share = StepShare(
            self._train_batch_size, args.world_size, args.gradient_accumulation_steps, args.process_index
        )
        steps = StreamSteps(stream, share, sharing=self.sharing, begun=begun, check=check)
        return DataLoader(steps, batch_size=None, collate_fn=lambda batch: batch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.stream is not None and not batches:
            self._end_of_stream()
        return batches, items

    def _end_of_stream(self) -> None:
        """Training stops, in all processes, with a log and a checkpoint as at the last of ``max_steps``."""
        state, control, stream = self.state, self.control, self.stream
        control.should_training_stop = True
        if stream is None or state.global_step >= state.max_steps:
            return
        control.should_log, control.should_save = True, self.args.save_strategy == "steps"
        if self.is_world_process_zero():
            logger.warning(
                "%s ended after step %d of %d (%d interactions, %d left out): training stops there, and the learning "
                "rate where its schedule was",
                stream.reading.name,
                state.global_step,
                state.max_steps,
                stream.interactions,
                stream.left_out,
            )

    # ------------------------------------------------------------------------------- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, InteractionStream):
            raise TypeError("SDPOTrainer: eval_dataset must be there whole, and no stream")
        named = isinstance(self.eval_dataset, dict) and eval_dataset in list(self.eval_dataset)
        if eval_dataset is not None and not named and not isinstance(eval_dataset, InteractionDataset):
            eval_dataset = self.make_dataset(eval_dataset, "eval_dataset")
            if self.stream is not None:
                logger.warning(
                    "eval_dataset: whether it holds interactions that were trained on is not known: train_dataset is "
                    "a stream, and only held-out data that the trainer was given is looked for in it"
                )
        if eval_dataset is not self.train_dataset:  # else the loss in training is asked for
            check_held_out(self.args, self.train_dataset, eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> GroupSampler:
        return GroupSampler(
            eval_dataset.groups(self.sharing == "conversation"),
            each=self.args.eval_batch_size,
            processes=self.args.world_size,
            costs=eval_dataset.costs(self.sharing) if self.args.world_size > 1 else None,
            shuffle=False,
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self.make_dataset(test_dataset, "test_dataset"))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The loss over the whole set, normalized as in training, and the signal's statistics."""
        self._evaluation = evaluation = _Evaluation(self.new_metrics(), dataloader.dataset[0], self.args.device)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        loss, items = self.reduce_sum(evaluation.sums).tolist()
        metrics = evaluation.metrics.flush(reduce_sum=self.reduce_sum, gather=self.gather_values)
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(1.0, items)
        for name, value in {**metrics, **self.measure(dataloader.dataset)}.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def measure(self, dataset: InteractionDataset) -> dict[str, float]:
        """The measures of held-out interactions (docs/objectives.md), means; none where it has no text.

        The rows of each interaction are kept in `measured_rows`. All processes must call it.
        """
        measures = self._measures(dataset)
        rows = measures() if measures is not None else []
        if dataset is self.eval_dataset:
            self.measured_rows = rows
        return summary(rows) if rows else {}

    def _measures(self, dataset: InteractionDataset) -> HeldOutMeasures | None:
        """None where there is nothing to measure."""
        if self.tokenize is None or not dataset.measured:
            return None
        if dataset is not self._measures_of:
            self._measures_of, self.measures = dataset, HeldOutMeasures(self, dataset.measured)
        assert self.measures is not None
        return self.measures if self.measures.contexts else None

    def figures_of(self, held_out: InteractionDataset) -> list[str]:
        measures = self._measures(held_out)
        return ["loss", *self.new_metrics().names, *([] if measures is None else measures.names)]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds a batch to the evaluation's sums; returns its loss sum, which `evaluation_loop` drops."""
        interactions, evaluation = inputs["interactions"], self._evaluation
        packs = self.learner.ready(inputs, self.args.device)
        idle = 0
        if self.sharded:
            counted: Any = self.accelerator.gather(torch.tensor([len(packs)], device=self.args.device))
            idle = int(counted.max()) - len(packs)
        with torch.no_grad(), self.compute_loss_context_manager():
            for pack in packs:
                loss, statistics = self.run_pass(model, pack, 1)
                evaluation.sums[0] += loss.double()
                evaluation.metrics.add(pack, statistics)
            for _ in range(idle):
                self.run_pass(model, [evaluation.idle], 1)
        evaluation.sums[1] += self.learner.count(interactions)
        return evaluation.sums[0].float(), None, None

    # ------------------------------------------------------------------------- the teacher check

    def check_teacher(self, interactions: int | None = None) -> TeacherCheck | None:
        """What hindsight does to a sample of the training data; None where there is no text.

        Where the weights are sharded, all processes must call it.

        Args:
            interactions: how many to look at; None: ``args.teacher_check``.
        """
        count = self.args.teacher_check if interactions is None else interactions
        sample = [] if self.train_dataset is None else self.train_dataset.sample[:count]
        if len(sample) < 2 or self.tokenize is None:
            return None

        def log_ratios(items: list[TokenizedInteraction]) -> list[Tensor]:
            ratios = []
            with torch.no_grad():
                for item in items:
                    _, statistics = self.run_pass(self.model, [item], 1)
                    ratios.append(statistics.log_ratio[statistics.counts].float().cpu())
            return [ratio if len(ratio) else torch.zeros(1) for ratio in ratios]

        gathers = is_wrapped(self.model_wrapped)  # an engine's own hooks
        with training_mode(self.model, False), nullcontext() if gathers else gathered_layers(self.model):
            return teacher_check(sample, self.tokenize, log_ratios)

    def before_training(self, checkpoint: str | None) -> None:
        super().before_training(checkpoint)
        if checkpoint is not None:
            return  # the look was taken when the run began
        first = self.is_world_process_zero()
        if self.sharded and is_wrapped(self.model_wrapped):
            return  # a second call
        # FSDP may have loaded the weights in the first process alone; DeepSpeed ZeRO-3 divides them at once.
        if self.args.teacher_check and (first or is_partitioned(self.model)):
            check = self.check_teacher()
            if check is not None and first:
                logger.log(logging.WARNING if check.warning else logging.INFO, "%s", check)


class _Evaluation:
    """What one evaluation adds up.

    Attributes:
        idle: an interaction for a process that has fewer packs than another.
        sums: ``[2]`` float64: the loss, and the items that it is divided by.
    """

    def __init__(self, metrics: SignalMetrics, idle: TokenizedInteraction, device: torch.device):
        self.metrics, self.idle = metrics, idle
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
