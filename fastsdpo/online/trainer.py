"""`OnlineSDPOTrainer`: prompts -> answers -> the user's follow-ups -> one optimizer step.

The step itself (packs, shared prefixes, teachers, loss, checkpoints) is `SDPOTrainer`'s. What is added
happens in `prepare_batches`, between the data loader and the loss: sampling, asking, tokenizing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from fastsdpo.data import Interaction, TokenizedInteraction
from fastsdpo.data.interactions import is_blank
from fastsdpo.online.config import OnlineSDPOConfig
from fastsdpo.online.degeneration import CollapseDetector, degenerate
from fastsdpo.online.prompts import PromptDataset, PromptSampler, collate_prompts
from fastsdpo.online.sampling import Sample, ServerSampler, generate
from fastsdpo.online.users import UserSimulator, ask
from fastsdpo.trainer.adapters import is_peft
from fastsdpo.trainer.trainer import SDPOTrainer

logger = logging.getLogger("fastsdpo.online")

STATE_FILE = "online_state_{}.json"  # of each process, in checkpoints
INTERACTIONS_FILE = "interactions.jsonl"
ANSWERS_FILE = "eval_answers.jsonl"


@dataclass(frozen=True)
class SampledInteraction(TokenizedInteraction):
    """A tokenized interaction and, where the loss needs them, its numbers of sampling time.

    Attributes:
        old_logps: per token of the completion; None: those of the model as it is.
        advantages: the same, teacher's minus student's.
    """

    old_logps: tuple[float, ...] | None = None
    advantages: tuple[float, ...] | None = None


class OnlineSDPOTrainer(SDPOTrainer):
    """Trains a causal language model on a user's reactions to its own answers.

    Args:
        model: as for `SDPOTrainer`.
        args: the settings.
        user: who reacts to the answers.
        train_dataset: prompts: texts, message lists, rows with ``prompt``, or a file of these.
        eval_dataset: held-out prompts. Evaluation answers them (``eval_temperature``) and reports
            length, degenerate answers and, where the user has ``satisfied``, its share.
        processing_class, peft_config, callbacks, optimizers: as for `SDPOTrainer`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `SDPOTrainer`, and where answers cannot be
            sampled: sharded weights, or a server without LoRA to synchronize.
    """

    args: OnlineSDPOConfig

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
        self.data_collator = collate_prompts
        if self._tokenizer_for_check is None:
            raise ValueError("OnlineSDPOTrainer: processing_class must be a tokenizer, got None")
        if self._sharded:
            raise NotImplementedError(
                "OnlineSDPOTrainer: FSDP and DeepSpeed hold the weights in shards, from which answers "
                "cannot be sampled (and adapters not be written for a server); use DDP"
            )
        self.user: Any = user
        self.server: ServerSampler | None = None
        if args.generation_url is not None:
            if args.generation_sync == "lora" and not is_peft(self.model):
                raise ValueError(
                    "OnlineSDPOTrainer: generation_sync='lora' needs an adapter (peft_config); "
                    "the server cannot be given other weights while it runs"
                )
            self.server = ServerSampler(
                args.generation_url,
                args.generation_model,
                folder=os.path.join(args.output_dir, "adapters"),
            )
        self.end_ids = self._tokenizer_for_check.end_ids(self.accelerator.unwrap_model(self.model))
        self.collapse = self._new_detector()
        self.degenerate_stop: str | None = None
        self._warned: str | None = None
        self._rollout: list[list[SampledInteraction]] = []
        self._rollout_of = -1  # the batch of prompts that it answers
        self._online = _Sums()
        self._entropies: list[tuple[int, Tensor]] = []
        self.add_callback(_OnlineCallback(self))

    @staticmethod
    def _dataset(args: Any, source: Any, tokenizer: Any, name: str) -> Any:
        if source is None:
            return None
        if isinstance(source, dict):
            return {key: PromptDataset.from_source(value, f"{name}[{key!r}]") for key, value in source.items()}
        return PromptDataset.from_source(source, name)

    def _new_detector(self) -> CollapseDetector:
        return CollapseDetector(
            window=self.args.degenerate_window,
            min_entropy_share=self.args.min_entropy_share,
            max_share=self.args.stop_when_degenerate,
        )

    # ---------------------------------------------------------------------------------- prompts

    @property
    def _step_prompts(self) -> int:
        args = self.args
        return self._train_batch_size * args.world_size * args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSampler:  # type: ignore[override]
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        self._sampler = PromptSampler(  # type: ignore[assignment]
            len(dataset),
            step=self._step_prompts,
            repeats=args.updates_per_batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        return self._sampler  # type: ignore[return-value]

    def _get_eval_sampler(self, eval_dataset: Any) -> PromptSampler:  # type: ignore[override]
        step = self.args.eval_batch_size * self.args.world_size
        return PromptSampler(len(eval_dataset), step=step, shuffle=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is not None and not isinstance(eval_dataset, (str, PromptDataset)):
            eval_dataset = PromptDataset.from_source(eval_dataset, "eval_dataset")
        return super(SDPOTrainer, self).get_eval_dataloader(eval_dataset)

    def idle_interaction(self) -> TokenizedInteraction:
        messages = self.train_dataset.prompts[0]
        return self._tokenizer_for_check(Interaction(messages, "", "-"))  # type: ignore[misc]

    def check_teacher(self, interactions: int | None = None) -> None:
        """None: there is no follow-up to look at before the first answer."""
        return None

    # --------------------------------------------------------------------------------- the rollout

    @property
    def interactions(self) -> int:
        """How many answers users were asked about when the current batch began, all processes."""
        batch = self.state.global_step // self.args.updates_per_batch
        return batch * self._step_prompts * self.args.num_generations

    def prepare_batches(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples answers and asks the user, or takes the last answers again (updates_per_batch)."""
        number = self.state.global_step // self.args.updates_per_batch
        if number != self._rollout_of or len(self._rollout) != len(batches):
            self._rollout = self._roll_out([batch["prompts"] for batch in batches], number)
            self._rollout_of = number
        return [{"interactions": interactions} for interactions in self._rollout]

    def _roll_out(
        self, micro_batches: list[list[tuple[int, list[dict]]]], number: int
    ) -> list[list[SampledInteraction]]:
        args, tokenize = self.args, self._tokenizer_for_check
        assert tokenize is not None
        # (micro-batch, index of the prompt, messages), one per answer
        asked = [
            (micro, index, messages)
            for micro, prompts in enumerate(micro_batches)
            for index, messages in prompts
            for _ in range(args.num_generations)
        ]
        prompts = [messages for _, _, messages in asked]
        tokens = [tokenize.generation_prompt(messages) for messages in prompts]
        samples = self._sample(tokens, number)
        responses = [self._text(sample) for sample in samples]
        if hasattr(self.user, "at"):
            self.user.at(self.interactions)
        followups = ask(self.user, prompts, responses)
        found: list[list[SampledInteraction]] = [[] for _ in micro_batches]
        rows: list[dict] = []
        for (micro, index, messages), sample, response, followup in zip(asked, samples, responses, followups):
            row = {
                "prompt": messages,
                "completion": {"role": "assistant", "content": response},
                "user_response": {"role": "user", "content": followup or ""},
                "id": f"{number}-{index}-{len(rows)}",
                "conversation_id": f"{number}-{index}",
                "step": self.state.global_step,
            }
            rows.append(row)
            if followup is None or is_blank(followup):
                continue
            one = tokenize(Interaction(messages, "", followup, row["id"], row["conversation_id"]), sample.ids)
            found[micro].append(
                SampledInteraction(
                    one.prompt_ids,
                    one.teacher_prompt_ids,
                    one.completion_ids,
                    one.id,
                    one.conversation_id,
                    one.neutral_prompt_ids,
                    None if sample.logps is None else tuple(sample.logps.tolist()),
                )
            )
        if args.updates_per_batch > 1:
            found = [self._score(interactions) for interactions in found]
        self._count_answers(prompts, samples, responses, followups)
        self._write(INTERACTIONS_FILE, rows)
        return found

    def _sample(self, prompts: list[list[int]], number: int) -> list[Sample]:
        args = self.args
        if not prompts:
            return []
        if self.server is not None:
            if args.generation_sync == "lora" and number > 0:
                if self.is_world_process_zero():
                    self.server.load_adapter(self.accelerator.unwrap_model(self.model), f"sdpo-{number}")
                self.server._loaded = f"sdpo-{number}"
                self.accelerator.wait_for_everyone()
            seed = (args.seed * 1_000_003 + number * args.world_size + args.process_index) % 2**31
            return self.server.sample(
                prompts,
                max_new_tokens=args.max_new_tokens,
                temperature=args.sampling_temperature,
                end_ids=self.end_ids,
                seed=seed,
            )
        return generate(
            self.accelerator.unwrap_model(self.model),
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.sampling_temperature,
            end_ids=self.end_ids,
            batch_size=args.generation_batch_size,
            seed=f"{args.seed}/{number}/{args.process_index}",
        )

    def _text(self, sample: Sample) -> str:
        assert self._tokenizer_for_check is not None
        return self._tokenizer_for_check.said(sample.ids)

    def _score(self, interactions: list[SampledInteraction]) -> list[SampledInteraction]:
        """With the log-probabilities and advantages of now, before the first update."""
        scored: list[SampledInteraction] = []
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for pack in self._packs(interactions):
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

    def _count_answers(
        self,
        prompts: list[list[dict]],
        samples: list[Sample],
        responses: list[str],
        followups: list[str | None],
    ) -> None:
        self._online.add("response_length", [len(sample.ids) for sample in samples])
        self._online.add("ended", [sample.ids[-1] in self.end_ids for sample in samples])
        self._online.add("degenerate", [degenerate(text) is not None for text in responses])
        self._online.add("followups", [text is not None and not is_blank(text) for text in followups])
        if hasattr(self.user, "satisfied"):
            self._online.add("satisfaction", self.user.satisfied(prompts, responses))
        self.collapse.add(gather_object(responses) if self.args.world_size > 1 else responses)

    def _record(self, interactions: Any, statistics: Any) -> None:
        super()._record(interactions, statistics)
        if self.is_in_train and self.model.training:
            # -log p of a token drawn from p is an unbiased estimate of p's entropy.
            counts = statistics.counts
            total = -(statistics.student_logps * counts).sum() / counts.sum().clamp(min=1)
            self._entropies.append((len(interactions), total.detach()))

    def check_collapse(self) -> str | None:
        """After each step: warns, once for each kind; the reason to stop, if that was asked for."""
        values = [float(value) for count, value in self._entropies for _ in range(count)]
        self._entropies = []
        if self.args.world_size > 1:
            values = gather_object(values)
        self._online.add("entropy", values)
        self.collapse.add_entropies(values)
        problem = self.collapse.problem()
        if problem is None:
            return None
        kind = problem.split(" of ")[-1]
        if kind != self._warned and self.is_world_process_zero():
            logger.warning("step %d: the model is degenerating: %s", self.state.global_step, problem)
        self._warned = kind
        return problem if self.args.stop_when_degenerate is not None else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs.update(self._online.flush(self._reduce_sum, "online/"))
            logs["online/interactions"] = float(
                self.state.global_step // self.args.updates_per_batch * self._step_prompts * self.args.num_generations
            )
        super().log(logs, start_time)

    def _write(self, name: str, rows: list[dict]) -> None:
        """Appends to a file of the output folder; interaction rows can be trained on again."""
        if not self.args.log_interactions:
            return
        rows = gather_object(rows) if self.args.world_size > 1 else rows
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with open(os.path.join(self.args.output_dir, name), "a", encoding="utf-8") as file:
                file.write(text)

    # -------------------------------------------------------------------------------- evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Answers to held-out prompts: length, degenerate share and, where known, satisfaction."""
        args, tokenize = self.args, self._tokenizer_for_check
        assert tokenize is not None
        sums = _Sums()
        rows: list[dict] = []
        if hasattr(self.user, "at"):
            self.user.at(max(0, self.interactions - 1) if self.state.global_step else 0)
        for number, batch in enumerate(dataloader):
            prompts = [messages for _, messages in batch["prompts"]]
            if not prompts:
                continue
            tokens = [tokenize.generation_prompt(messages) for messages in prompts]
            samples = generate(
                self.accelerator.unwrap_model(self.model),
                tokens,
                max_new_tokens=args.max_new_tokens,
                temperature=args.eval_temperature,
                end_ids=self.end_ids,
                batch_size=args.generation_batch_size,
                seed=f"{args.seed}/eval/{number}/{args.process_index}",
            )
            responses = [self._text(sample) for sample in samples]
            satisfied = [None] * len(prompts)
            if hasattr(self.user, "satisfied"):
                satisfied = list(self.user.satisfied(prompts, responses))
                sums.add("satisfaction", satisfied)
            sums.add("response_length", [len(sample.ids) for sample in samples])
            sums.add("response_words", [len(text.split()) for text in responses])
            sums.add("ended", [sample.ids[-1] in self.end_ids for sample in samples])
            sums.add("degenerate", [degenerate(text) is not None for text in responses])
            rows += [
                {
                    "step": self.state.global_step,
                    "prompt": messages[-1]["content"],
                    "response": text,
                    "satisfied": good,
                }
                for messages, text, good in zip(prompts, responses, satisfied)
            ]
        metrics = sums.flush(self._reduce_sum, f"{metric_key_prefix}_")
        metrics[f"{metric_key_prefix}_interactions"] = float(self.interactions)
        self._write(ANSWERS_FILE, rows)
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state: dict[str, Any] = {
            "collapse": self.collapse.state_dict(),
            "rollout_of": self._rollout_of,
            "rollout": [
                [vars(item) for item in batch] for batch in (self._rollout if self.args.updates_per_batch > 1 else [])
            ],
        }
        path = os.path.join(output_dir, STATE_FILE.format(self.args.process_index))
        os.makedirs(output_dir, exist_ok=True)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(state, file)
        os.replace(f"{path}.part", path)

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
        self.collapse.load_state_dict(state["collapse"])
        if state["rollout"]:
            self._rollout_of = state["rollout_of"]
            self._rollout = [[SampledInteraction(**item) for item in batch] for batch in state["rollout"]]

    def forget_after(self, step: int) -> None:
        """Drops what the output folder's files tell of later steps: a resumed run repeats them."""
        self._keep_rows(INTERACTIONS_FILE, step - 1)
        self._keep_rows(ANSWERS_FILE, step)

    def forget_answers(self, step: int) -> None:
        """Drops held-out answers of this step and later ones, before they are given again."""
        self._keep_rows(ANSWERS_FILE, step - 1)

    def _keep_rows(self, name: str, last: int) -> None:
        """Cuts a file of the output folder to its rows up to step ``last``."""
        path = os.path.join(self.args.output_dir, name)
        wanted = self.args.log_interactions and self.is_world_process_zero()
        if not wanted or not os.path.exists(path):
            return
        kept = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut off by the end of the run before
                if row["step"] <= last:
                    kept.append(line)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(f"{path}.part", path)


class _Sums:
    """Means over the values added, over all processes."""

    NAMES = ("response_length", "response_words", "ended", "degenerate", "followups", "satisfaction", "entropy")

    def __init__(self):
        self.values = {name: [0.0, 0.0] for name in self.NAMES}

    def add(self, name: str, values: Sequence[Any]) -> None:
        self.values[name][0] += float(sum(values))
        self.values[name][1] += len(values)

    def flush(self, reduce_sum: Any, prefix: str) -> dict[str, float]:
        table = torch.tensor(list(self.values.values()), dtype=torch.float64)
        totals = reduce_sum(table).tolist()
        self.__init__()
        return {f"{prefix}{name}": total / count for name, (total, count) in zip(self.NAMES, totals) if count}


class _OnlineCallback(TrainerCallback):
    def __init__(self, trainer: OnlineSDPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.forget_after(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        problem = self.trainer.check_collapse()
        if problem is not None:
            logger.error("stopping with a checkpoint: %s", problem)
            self.trainer.degenerate_stop = problem
            control.should_save = True
            control.should_training_stop = True
