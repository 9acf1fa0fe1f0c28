"""`OnlineSDPOTrainer`: prompts -> answers -> the user's follow-ups -> one optimizer step.

The step itself (packs, shared prefixes, teachers, loss, checkpoints) is `StepTrainer`'s. What is added
happens in `prepare_batches`, between the data loader and the loss: sampling, asking, tokenizing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction
from fastsdpo.data.output import atomic_file
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.figures import AnswerFigures, CollapseWatch
from fastsdpo.online.generation import Generation
from fastsdpo.online.prompts import PromptDataset, PromptSampler, collate_prompts
from fastsdpo.online.rollout import ANSWERS_FILE, INTERACTIONS_FILE, Answers, RowFiles, SampledInteraction, roll_out
from fastsdpo.online.sampling import Sample
from fastsdpo.online.users import UserSimulator
from fastsdpo.trainer.processes import gather_list
from fastsdpo.trainer.step_trainer import StepTrainer
from fastsdpo.trainer.whole_weights import unsharded

logger = logging.getLogger("fastsdpo.online")

STATE_FILE = "online_state_{}.json"  # of each process, in checkpoints


class OnlineSDPOTrainer(StepTrainer):
    """Trains a causal language model on a user's reactions to its own answers.

    Args:
        model: as for `SDPOTrainer`.
        args: the settings.
        user: who reacts to the answers.
        train_dataset: prompts: texts, message lists, rows with ``prompt``, or a file of these.
        eval_dataset: held-out prompts. Evaluation answers them (``eval_temperature``) and reports
            length, degenerate answers and, if the user has ``satisfied``, the share of satisfied answers.
        processing_class, peft_config, callbacks, optimizers: as for `SDPOTrainer`.

    Raises:
        TypeError, ValueError, NotImplementedError: as for `SDPOTrainer`, and if answers cannot be sampled
            (`fastsdpo.online.generation.Generation`).
    """

    args: OnlineSDPOConfig
    tokenize: InteractionTokenizer
    collate: Any = staticmethod(collate_prompts)
    batch_of = "prompts"

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: OnlineSDPOConfig | None = None,
        user: UserSimulator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = OnlineSDPOConfig(output_dir="online_output") if args is None else args
        if not isinstance(args, OnlineSDPOConfig):
            raise TypeError(f"OnlineSDPOTrainer: args must be an OnlineSDPOConfig, got {type(args).__name__}")
        if not callable(getattr(user, "feedback", None)):
            raise TypeError(
                f"OnlineSDPOTrainer: user must have feedback(prompts, responses), got {type(user).__name__}"
            )
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, optimizers
        )
        if self.tokenize is None:
            raise ValueError("OnlineSDPOTrainer: processing_class must be a tokenizer, got None")
        self._warn_of_shared_prompts()
        self.user: Any = user
        self.generation = Generation(self)
        self.figures = AnswerFigures()
        self.collapse = CollapseWatch(args, self.figures)
        self.files = RowFiles(args.output_dir, enabled=args.log_interactions and self.is_world_process_zero())
        self._rollout: list[list[SampledInteraction]] = []
        self._rollout_of = -1  # the batch of prompts that it answers
        self._told: str | None = None  # a follow-up in every held-out prompt
        self.add_callback(_ResumedFiles(self))
        self.add_callback(self.collapse)

    @property
    def degenerate_stop(self) -> str | None:
        """The reason if training was stopped because the model degenerated, or None."""
        return self.collapse.stopped

    # ---------------------------------------------------------------------------------- prompts

    def make_dataset(self, source: Any, name: str) -> Any:
        if source is None:
            return None
        if isinstance(source, dict) and name != "train_dataset":
            return {key: PromptDataset.from_source(value, f"{name}[{key!r}]") for key, value in source.items()}
        return PromptDataset.from_source(source, name)

    def _warn_of_shared_prompts(self) -> None:
        """A warning where held-out prompts are trained on."""
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"held-out": self.eval_dataset}
        trained = {json.dumps(messages) for messages in self.train_dataset.prompts}
        for name, dataset in held_out.items():
            prompts = [] if dataset is None else dataset.prompts
            if shared := sum(json.dumps(messages) in trained for messages in prompts):
                logger.warning(
                    "%d of the %d %s prompts are trained on too: what their answers show is no measure of new ones",
                    *(shared, len(prompts), name),
                )

    def data_order(self) -> dict[str, Any]:
        args = self.args
        return {
            "data_seed": args.order_seed,
            "updates_per_batch": args.updates_per_batch,
            "the number of prompts": len(self.train_dataset),
        }

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        self.sampler = PromptSampler(
            len(dataset), step=self.step_size, repeats=args.updates_per_batch, seed=args.order_seed
        )
        return self.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> PromptSampler:
        step = self.args.eval_batch_size * self.args.world_size
        return PromptSampler(len(eval_dataset), step=step, shuffle=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        named = isinstance(self.eval_dataset, dict) and eval_dataset in list(self.eval_dataset)
        if eval_dataset is not None and not named:
            eval_dataset = PromptDataset.from_source(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self.make_dataset(test_dataset, "test_dataset"))

    def idle_interaction(self) -> TokenizedInteraction:
        return self.tokenize(Interaction(self.train_dataset.prompts[0], "", "-"))

    # --------------------------------------------------------------------------------- the rollout

    @property
    def interactions(self) -> int:
        """How many answers users had been asked about when the current batch began, over all processes."""
        batch = self.state.global_step // self.args.updates_per_batch
        prompts, size = 0 if self.train_dataset is None else len(self.train_dataset), self.step_size
        epochs, batches = divmod(batch, max(1, -(-prompts // size)))  # the last batch of an epoch has what is left
        return (epochs * prompts + batches * size) * self.args.num_generations

    def prepare_batches(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples answers and asks the user, or uses the last answers once more (`updates_per_batch`)."""
        number = self.state.global_step // self.args.updates_per_batch
        if number != self._rollout_of or len(self._rollout) != len(batches):
            self._rollout = self.roll_out([batch["prompts"] for batch in batches], number)
            self._rollout_of = number
        return [{"interactions": interactions} for interactions in self._rollout]

    def roll_out(
        self, micro_batches: list[list[tuple[int, list[dict]]]], number: int
    ) -> list[list[SampledInteraction]]:
        """Returns the interactions of one batch of prompts, by micro-batch; see `fastsdpo.online.rollout`."""
        if hasattr(self.user, "at"):
            self.user.at(self.interactions)
        found, rows, answers = roll_out(
            micro_batches,
            sample=lambda prompts: self.sample(prompts, number),
            tokenize=self.tokenize,
            user=self.user,
            answers_per_prompt=self.args.num_generations,
            number=number,
            step=self.state.global_step,
        )
        if self.args.updates_per_batch > 1:
            found = [self._score(interactions) for interactions in found]
        self.figures.add_answers(answers, self.generation.end_ids)
        self.figures.add_followups(answers.followups)
        if hasattr(self.user, "satisfied"):
            self.figures.add("satisfaction", self.user.satisfied(answers.prompts, answers.texts))
        self.collapse.add_texts(answers.texts)
        self.files.append(INTERACTIONS_FILE, gather_list(rows))
        return found

    def sample(self, prompts: list[list[int]], number: int) -> list[Sample]:
        """Draws one answer per prompt, on the server or from the model here.

        Args:
            prompts: token ids, each with its generation prompt.
            number: the rollout's number; the draws depend on it and on the seed.
        """
        args = self.args
        return self.generation(
            prompts,
            seed=f"{args.seed}/{number}/{args.process_index}",
            max_new_tokens=args.max_new_tokens,
            temperature=args.sampling_temperature,
        )

    def _score(self, interactions: list[SampledInteraction]) -> list[SampledInteraction]:
        """With the log-probabilities and advantages of now, before the first update."""
        scored: list[SampledInteraction] = []
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), unsharded(self.accelerator.unwrap_model(self.model)):
            for pack in self.learner.packs(interactions):
                _, statistics = self.run_pass(self.model, pack, 1)
                sizes = [len(item.completion_ids) for item in pack]
                columns = zip(
                    pack,
                    statistics.student_logps.float().cpu().split(sizes),
                    statistics.log_ratio.float().cpu().split(sizes),
                )
                for item, logps, ratio in columns:
                    old = item.old_logps or tuple(logps.tolist())
                    scored.append(replace(item, old_logps=old, advantages=tuple(ratio.tolist())))
        self.model.train(training)
        return scored

    def pass_options(self, interactions: Sequence[TokenizedInteraction]) -> dict[str, Any]:
        args = self.args
        options: dict[str, Any] = {}
        for name in ("old_logps", "advantages") if args.ppo_clip is not None else ("old_logps",):
            values = [getattr(item, name, None) for item in interactions]
            if all(value is not None for value in values):
                flat = [number for value in values for number in value or ()]
                options[name] = torch.tensor(flat, device=args.device)
        if args.ppo_clip is not None:
            options.update(ppo_clip=args.ppo_clip, center_advantages=args.center_advantages)
        elif args.is_clip is not None and "old_logps" in options:
            options["is_clip"] = args.is_clip  # without: the ratio is 1
        return options

    # ------------------------------------------------------------------------------- what is seen

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        loss, statistics = super().compute_loss(model, inputs, True, num_items_in_batch)
        if num_items_in_batch is not None and self.is_in_train and self.speaks:
            self.collapse.add_pass(len(inputs["interactions"]), statistics)
        return (loss, statistics) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs.update(self.figures.flush(self.reduce_sum, "online/"))
            logs["online/interactions"] = float(self.interactions)
        super().log(logs, start_time)

    # -------------------------------------------------------------------------------- evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Answers held-out prompts; reports length, content, degenerate share and, if known, satisfaction."""
        figures = AnswerFigures()
        rows: list[dict] = []
        if hasattr(self.user, "at"):
            self.user.at(max(0, self.interactions - 1) if self.state.global_step else 0)
        for number, batch in enumerate(dataloader):
            asked = [messages for _, messages in batch["prompts"]]
            answers = self.held_out_answers(asked, number, told=self._told)  # in all processes
            if not asked:
                continue
            satisfied = [None] * len(answers.texts)
            if hasattr(self.user, "satisfied"):
                satisfied = list(self.user.satisfied(answers.prompts, answers.texts))
                figures.add("satisfaction", satisfied)
            figures.add_answers(answers, self.generation.end_ids)
            figures.add_content(answers.prompts, answers.texts)
            figures.add("response_words", [len(text.split()) for text in answers.texts])
            for messages, text, good in zip(answers.prompts, answers.texts, satisfied):
                row = {"step": self.state.global_step, "prompt": messages[-1]["content"], "told": self._told}
                rows.append({**row, "response": text, "satisfied": good})
        metrics = figures.flush(self.reduce_sum, f"{metric_key_prefix}_")
        metrics[f"{metric_key_prefix}_interactions"] = float(self.interactions)
        self.files.append(ANSWERS_FILE, gather_list(rows))
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    def figures_of(self, held_out: PromptDataset) -> list[str]:
        return [*AnswerFigures.held_out(satisfaction=hasattr(self.user, "satisfied")), "interactions"]

    def evaluate_told(self, followup: str) -> dict[str, float]:
        """Evaluates with the same follow-up in every held-out prompt, as the teacher reads it.

        The result shows what the model does when it is told. With a user's wish, that is the headroom of training;
        with a remark about something else, the effect of any text in the prompt. ``eval_answers.jsonl`` has the
        answers, with the follow-up as ``told``.
        """
        self._told = followup
        try:
            return self.evaluate()
        finally:
            self._told = None

    def held_out_answers(self, prompts: list[list[dict]], number: int = 0, told: str | None = None) -> Answers:
        """Answers prompts at ``eval_temperature``.

        Args:
            prompts: message lists.
            number: the batch's number; the draws depend on it.
            told: a follow-up to put into every prompt, as the teacher reads it; None: none.
        """
        args, tokenize = self.args, self.tokenize
        starts = [tokenize.generation_prompt(messages) for messages in prompts]
        if told is not None:
            starts = [tokenize(Interaction(messages, "", told)).teacher_prompt_ids for messages in prompts]
        samples = self.generation(
            starts,
            seed=f"{args.seed}/eval/{number}/{args.process_index}",
            max_new_tokens=args.eval_max_new_tokens or args.max_new_tokens,
            temperature=args.eval_temperature,
            here=args.generation_sync == "none",  # whose server has other weights
        )
        texts = [tokenize.said(sample.ids, start) for sample, start in zip(samples, starts)]
        return Answers(prompts, samples, texts, [])

    # ------------------------------------------------------------------------------- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state: dict[str, Any] = {
            "collapse": self.collapse.detector.state_dict(),
            "rollout_of": self._rollout_of,
            "rollout": [
                [vars(item) for item in batch] for batch in (self._rollout if self.args.updates_per_batch > 1 else [])
            ],
        }
        with atomic_file(Path(output_dir, STATE_FILE.format(self.args.process_index))) as file:
            file.write(json.dumps(state).encode())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE.format(self.args.process_index))
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"OnlineSDPOTrainer: {path} is missing; was the checkpoint written by another trainer, "
                "or by fewer processes?"
            )
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        self.collapse.detector.load_state_dict(state["collapse"])
        if state["rollout"]:
            self._rollout_of = state["rollout_of"]
            self._rollout = [[SampledInteraction(**item) for item in batch] for batch in state["rollout"]]

    def forget_after(self, step: int) -> None:
        """Removes later steps from the files in the output folder, since a resumed run repeats them."""
        self.files.keep(INTERACTIONS_FILE, step - 1)
        self.files.keep(ANSWERS_FILE, step)

    def forget_answers(self, step: int) -> None:
        """Removes the held-out answers of this step and later ones, since they are about to be given again."""
        self.files.keep(ANSWERS_FILE, step - 1)


class _ResumedFiles(TrainerCallback):
    """A run that goes on drops the rows of the steps that it repeats."""

    def __init__(self, trainer: OnlineSDPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.forget_after(state.global_step)
