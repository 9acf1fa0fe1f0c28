"""`SDPOTrainer`: batch -> packs -> one forward pass of student and teacher -> loss -> statistics.

What is overridden of `transformers.Trainer`, and why:

    get_batch_samples          counts the global batch before its first micro-step
    training_step              a micro-batch in packs of bounded size
    compute_loss               the objective
    prediction_step, evaluation_loop    the same on held-out interactions, weighted exactly
    evaluate                   leaves no loader behind, and the model to be wrapped for training
    save_model                 the whole weights, however they are sharded
    create_optimizer           AdamW that keeps small steps in bfloat16
    _get_train_sampler         order by conversation; no repeated interactions
    _save_checkpoint, train    checkpoints that are whole, and found again (see checkpoints.py)
    _save_optimizer_and_scheduler, _load_optimizer_and_scheduler    the teacher's weights
    log                        the statistics of the signal
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from fastsdpo.data import InteractionTokenizer, TokenizedInteraction
from fastsdpo.data.chat_template import reads_clock
from fastsdpo.modeling import default_dtype, load_model_and_tokenizer
from fastsdpo.prefix import (
    ResponseStates,
    above_the_decoder,
    check_head,
    check_passes,
    check_sharing,
    count_tokens,
    head_parameters,
    is_wrapped,
    no_grad_pass,
    rotary_limit,
    shared_forward,
)
from fastsdpo.trainer.adapters import adapter_is_silent, check_adapter, is_peft
from fastsdpo.trainer.checkpoints import (
    PART,
    check_output_folder,
    check_saved_model,
    damage_of,
    delete_old_checkpoints,
    find_checkpoint,
    finish_checkpoint,
    writing,
)
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.leaks import find_leaks
from fastsdpo.trainer.loss import (
    TokenStatistics,
    count_items,
    guide,
    mix_teachers,
    sdpo_step_loss,
    token_weights,
)
from fastsdpo.trainer.metrics import SignalMetrics
from fastsdpo.trainer.noise import check_noise, dropout_rates, turn_off
from fastsdpo.trainer.optim import (
    ADAMW,
    TORCHAO,
    AdamWBF16,
    choose_update,
    lost_steps,
    seeded,
)
from fastsdpo.trainer.packs import GroupSampler, collate, pack_sharing, split_packs
from fastsdpo.trainer.teacher_check import TeacherCheck, teacher_check
from fastsdpo.trainer.teacher_weights import TeacherWeights, other_head
from fastsdpo.trainer.template_date import keep_date, run_date

logger = logging.getLogger("fastsdpo.trainer")

TEACHER_FILE = "teacher_{}.safetensors"


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the text names the interactions."""


class SDPOTrainer(Trainer):
    """Trains a causal language model on logged interactions.

    Args:
        model: a transformers causal LM (or PEFT's), or a name that `load_model_and_tokenizer`
            takes: a folder, a GGUF file or a hub id. By name, it has the dtype of
            ``SDPOConfig.dtype``: the checkpoint's on a GPU, float32 on a CPU.
        args: the settings.
        train_dataset: a path to interactions, or a collection of `Interaction`,
            `TokenizedInteraction` or rows as `fastsdpo prepare` writes them.
        eval_dataset: the same, held out; or a dict of several.
        processing_class: the tokenizer; None: the one that comes with a model given by name.
        peft_config: of a new adapter to train (`peft.LoraConfig`, ...); None where the model is an
            adapter on its base already (the folder of one, a `peft.PeftModel`): training goes on.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        TypeError, ValueError: a setting or dataset is unusable; the text says which and why. So is
            held-out data of which a conversation is trained on (see `SDPOConfig.allow_leaks`).
        NotImplementedError: the model's head, its kind of adapter or a sharing asked for by name
            cannot be computed, a noise that ``disable_dropout`` cannot turn off, or a teacher that
            this kind of distributed training cannot hold.
    """

    args: SDPOConfig
    loss_is_scaled_for_ga = True

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
        module: Any = model
        if isinstance(model, (str, os.PathLike)):
            # Loaded on the CPU: Trainer puts it, or its shards, where it trains.
            dtype = default_dtype(args.device) if args.dtype is None else args.dtype
            module, tokenizer = load_model_and_tokenizer(model, dtype=dtype, device="cpu")
            processing_class = processing_class or tokenizer
        if not isinstance(module, nn.Module):
            raise TypeError(f"SDPOTrainer: model must be a model or a name, got {type(model).__name__}")
        check_adapter(module, peft_config)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # Trainer sets it later than the adapter draws its weights
            module = get_peft_model(module, peft_config)
        reason = above_the_decoder(module)
        if reason is not None:
            raise NotImplementedError(f"SDPOTrainer: the model is not supported: {reason}")
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                "SDPOTrainer: model must have weights to train, all are frozen"
                + (" (load an adapter with is_trainable=True)" if is_peft(module) else "")
            )
        if args.disable_dropout:
            turn_off(dropout_rates(module))

        self._tokenizer_for_check = None
        if processing_class is not None:
            if reads_clock(processing_class, args.chat_template_kwargs):  # type: ignore[arg-type]
                args.chat_template_date = run_date(args)
            self._tokenizer_for_check = InteractionTokenizer(
                processing_class, args.template, **args.tokenizer_options()
            )
        datasets = {}
        for name, source in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            datasets[name] = self._dataset(args, source, processing_class, name)
        self._check_held_out(args, datasets["train_dataset"], datasets["eval_dataset"])
        super().__init__(
            model=module,
            args=args,
            data_collator=collate,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            **datasets,
        )
        # The loss is normalized by num_items_in_batch, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                "SDPOTrainer: nn.DataParallel is not supported; start one process per GPU "
                "(torchrun or accelerate launch), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.is_deepspeed_enabled and args.max_tokens_per_pack is not None:
            # Its engine counts backward passes and steps by itself.
            logger.warning(
                "max_tokens_per_pack does not apply under DeepSpeed, which takes one backward pass per "
                "micro-batch: per_device_train_batch_size bounds the memory"
            )
        good, reason = self._agreed(check_head(self.model))
        if not good:
            raise NotImplementedError(f"SDPOTrainer: the model's head is not supported: {reason}")
        good, reason = self._agreed(check_passes(self.model))
        if not good:
            raise NotImplementedError(f"SDPOTrainer: the model is not supported: {reason}")
        noisy = self._agreed(check_noise(self.model, disable_dropout=args.disable_dropout))
        self.sharing = self._choose_sharing(noisy)
        self._limit_sharing()
        self._make_teacher()
        self._sampler: GroupSampler | None = None
        self._metrics = self._new_metrics()
        self._step: list[tuple[list[TokenizedInteraction], Tensor]] = []
        self.skipped_steps = 0
        self._writing_checkpoint = False
        self.add_callback(_StepCallback(self))

    @staticmethod
    def _dataset(args: SDPOConfig, source: Any, tokenizer: Any, name: str) -> Any:
        if source is None:
            return None
        if isinstance(source, dict):
            return {
                key: SDPOTrainer._dataset(args, value, tokenizer, f"{name}[{key!r}]") for key, value in source.items()
            }
        progress = not args.disable_tqdm and args.process_index == 0
        return InteractionDataset.from_source(
            source,
            tokenizer,
            args.template,
            name=name,
            progress=progress,
            **args.tokenizer_options(),
        )

    @staticmethod
    def _check_held_out(args: SDPOConfig, train: Any, held_out: Any, name: str = "eval_dataset") -> None:
        """Refuses, or with `allow_leaks` reports, held-out interactions that are trained on."""
        if isinstance(held_out, dict):
            for key, value in held_out.items():
                SDPOTrainer._check_held_out(args, train, value, f"{name}[{key!r}]")
            return
        if not isinstance(train, InteractionDataset) or not isinstance(held_out, InteractionDataset):
            return
        leaks = find_leaks(train, held_out)
        if leaks is None:
            return
        found = (
            f"{leaks.total:,} of its {len(held_out):,} interactions are in train_dataset: "
            f"{leaks.same:,} themselves, of {leaks.conversation:,} another part of the conversation "
            f"(the first: {leaks.example})"
        )
        if not args.allow_leaks:
            raise ValueError(
                f"SDPOTrainer: {name} must hold no conversation that is trained on, got {found}; "
                "split the conversations with fastsdpo prepare --eval-fraction, or pass "
                "allow_leaks=True (--allow-leaks) to go on"
            )
        logger.warning("%s is no measure of what was learned: %s; allow_leaks is set", name, found)

    def _choose_sharing(self, noisy: str | None) -> str:
        """The sharing to use: as asked for, or what the model allows, given its ``noisy`` module."""
        wanted = self.args.sharing
        if wanted == "off":
            return "off"
        good, reason = self._agreed(check_sharing(self.model, attention=self.args.attention))
        if noisy is not None:
            good, reason = False, f"branches would share the noise of {noisy} in training mode"
        if good:
            return "conversation" if wanted == "auto" else wanted
        if wanted != "auto":
            raise NotImplementedError(f"SDPOTrainer: sharing={wanted!r} is not possible: {reason}")
        logger.warning("prefixes are not shared (sharing='off'): %s", reason)
        return "off"

    def _limit_sharing(self) -> None:
        """How long the sequences may be that are shared: a named sharing must fit all the data."""
        self._shared_length: int | None = None
        self._unshared_reason: str | None = None
        limit = None if self.sharing == "off" else rotary_limit(self.model)
        if limit is None:
            return
        self._shared_length = limit.positions
        self._unshared_reason = (
            f"interactions with a sequence of more than {limit.positions} tokens run alone, and "
            f"their prefixes are not shared: the model's {limit.kind} rotary embeddings change there"
        )
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for dataset in (self.train_dataset, *held_out.values()):
            if not isinstance(dataset, InteractionDataset):
                continue
            longer = int((dataset.longest() > limit.positions).sum())
            if longer and self.args.sharing != "auto":
                raise NotImplementedError(
                    f"SDPOTrainer: sharing={self.args.sharing!r} is not possible for {longer:,} of "
                    f"{len(dataset):,} interactions: {limit}; set sharing='auto', which shares the "
                    "prefixes of the others, or a lower max_prompt_length (max_completion_length)"
                )

    def _sharing_of(self, pack: Sequence[TokenizedInteraction]) -> Any:
        """The sharing of a pack, which is "off" where a sequence is too long to be shared."""
        sharing = pack_sharing(pack, self.sharing, self._shared_length)
        if sharing != self.sharing and self._unshared_reason is not None:
            logger.warning("%s", self._unshared_reason)
            self._unshared_reason = None
        return sharing

    def _agreed(self, found: Any) -> Any:
        """The first process's finding, in all processes: FSDP may load the weights there alone."""
        if self.args.world_size > 1:
            broadcast_object_list(shared := [found])
            found = shared[0]
        return found

    # ------------------------------------------------------------------------------- the teacher

    def _make_teacher(self) -> None:
        """Copies of the trained weights, as far as the settings need them."""
        args = self.args
        frozen = args.teacher in ("frozen", "trust_region") or args.needs_reference
        if args.teacher == "trust_region" and head_parameters(self.model).softcap is not None:
            raise NotImplementedError(
                "SDPOTrainer: teacher='trust_region' is not possible for a model with a softcap on "
                "its logits: their mixture is not linear in the hidden states"
            )
        if args.is_guided and head_parameters(self.model).softcap is not None:
            raise NotImplementedError(
                "SDPOTrainer: guidance and neutral_followup are not possible for a model with a softcap "
                "on its logits: their differences are not linear in the hidden states"
            )
        self._ema = self._frozen = None
        # An adapter that changes nothing yet is the initial model when it is off.
        silent = frozen and is_peft(self.model) and self._agreed(adapter_is_silent(self.model))
        frozen_copy = frozen and not silent
        copies = args.teacher == "ema" or frozen_copy
        if copies and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise NotImplementedError(
                f"SDPOTrainer: teacher={args.teacher!r} (or a reference) copies the trained weights, "
                "which FSDP and DeepSpeed hold in shards; use teacher='live', a new LoRA adapter "
                "with a frozen teacher, or DDP"
            )
        if args.teacher == "ema":
            self._ema = TeacherWeights(self.model, moving=True)
        if frozen_copy:
            self._frozen = TeacherWeights(self.model, moving=False)

    def _initial(self) -> AbstractContextManager:
        """The model as it was at the start: other weights, or the new adapter disabled."""
        if self._frozen is not None:
            return self._frozen.swapped_in()
        return self.accelerator.unwrap_model(self.model).disable_adapter()

    # -------------------------------------------------------------------------------- one pass

    def run_pass(
        self,
        model: nn.Module,
        interactions: Sequence[TokenizedInteraction],
        num_items: int | float | Tensor,
    ) -> tuple[Tensor, TokenStatistics]:
        """Loss and statistics of one pack; the weights' divisor is ``num_items`` (S or N)."""
        args = self.args
        sharing = self._sharing_of(interactions)
        shared = {"sharing": sharing, "attention": args.attention}
        lengths = [len(item.completion_ids) for item in interactions]
        weights, counts = token_weights(lengths, args.normalization, args.ignore_first_k, num_items)
        weights, counts = weights.to(args.device), counts.to(args.device)

        frozen_hidden = reference_hidden = unguided = context = None
        if self._ema is not None:
            context = self._ema.swapped_in
        elif args.teacher == "frozen":
            context = self._initial
        self._computed = self._count_tokens(interactions, sharing, live=context is None)
        if args.is_guided:
            others = self._unguided(interactions)
            self._computed += self._count_tokens(others, sharing)
            with no_grad_pass(), nullcontext() if context is None else context():
                unguided = shared_forward(model, others, **shared)
        if args.teacher == "trust_region" or args.needs_reference:
            # What of the two distributions is needed: given the history alone, or with the follow-up.
            read = list(interactions)
            if args.teacher != "trust_region":
                read = [TokenizedInteraction(i.prompt_ids, i.prompt_ids, i.completion_ids) for i in interactions]
            elif not args.needs_reference:
                read = [
                    TokenizedInteraction(i.teacher_prompt_ids, i.teacher_prompt_ids, i.completion_ids)
                    for i in interactions
                ]
            self._computed += self._count_tokens(read, sharing)
            with no_grad_pass(), self._initial():
                states = shared_forward(model, read, **shared)
            frozen_hidden = states.teacher_hidden
            reference_hidden = states.student_hidden if args.needs_reference else None

        def loss_fn(states: ResponseStates) -> tuple[Tensor, TokenStatistics]:
            # All heads are taken here, inside the head's own forward pass, where FSDP has gathered it.
            head = head_parameters(model)
            teacher_hidden = frozen_head = None
            its_head = None if context is None else other_head(model, context)
            if frozen_hidden is not None:
                frozen_head = other_head(model, self._initial)
            if args.teacher == "trust_region":
                teacher_hidden, its_head = mix_teachers(
                    frozen_hidden, states.teacher_hidden, frozen_head, head, args.trust_region_mix
                )
            elif unguided is not None:
                teacher_hidden = guide(states.teacher_hidden, unguided, args.guidance)
            return sdpo_step_loss(
                states,
                head,
                weights=weights,
                counts=counts,
                sequences=len(interactions),
                teacher_hidden=teacher_hidden,
                teacher_head=its_head,
                reference_hidden=reference_hidden,
                reference_head=frozen_head,
                reference_kl=args.reference_kl,
                **self.pass_options(interactions),
                **self.loss_options(),
            )

        return shared_forward(model, interactions, teacher_context=context, loss_fn=loss_fn, **shared)

    @staticmethod
    def _count_tokens(items: Sequence[TokenizedInteraction], sharing: Any, *, live: bool = True) -> int:
        """Tokens that a `shared_forward` sends through the model."""
        counts = count_tokens(items, sharing=sharing, live=live)
        if live and all(item.teacher_prompt_ids == item.prompt_ids for item in items):
            return counts.student  # both are the same, and one pass
        return counts.student + counts.teacher

    def _unguided(self, interactions: Sequence[TokenizedInteraction]) -> list[TokenizedInteraction]:
        """The answers in the two contexts that `guide` goes from: x, and x with n."""
        found = []
        for item in interactions:
            neutral = item.prompt_ids
            if self.args.neutral_followup is not None:
                assert item.neutral_prompt_ids is not None  # the dataset has seen to that
                neutral = item.neutral_prompt_ids
            found.append(TokenizedInteraction(item.prompt_ids, neutral, item.completion_ids))
        return found

    def pass_options(self, interactions: Sequence[TokenizedInteraction]) -> dict[str, Any]:
        """Arguments of `sdpo_step_loss` that may depend on the interactions of a pass."""
        return {"is_clip": self.args.is_clip}

    def loss_options(self) -> dict[str, Any]:
        args = self.args
        return {
            "mode": args.mode,
            "alpha": args.alpha,
            "topk": args.topk,
            "add_tail": args.add_tail,
            "temperature": args.temperature,
            "chunk_size": args.chunk_size,
            "backend": args.backend,
        }

    def _count(self, interactions: Sequence[TokenizedInteraction]) -> int:
        lengths = [len(item.completion_ids) for item in interactions]
        return count_items(lengths, self.args.normalization, self.args.ignore_first_k)

    def _packs(self, interactions: Sequence[TokenizedInteraction]) -> list[list]:
        if self.is_deepspeed_enabled:  # one pass
            return split_packs(interactions, None, self.sharing)
        limit = self.args.max_tokens_per_pack
        return split_packs(interactions, limit, self.sharing, self._shared_length)

    @property
    def _sharded(self) -> bool:
        """Whether the processes have to run the model equally often, to gather its weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # -------------------------------------------------------------------------------- training

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and S or N over all of them and all processes."""
        if self.state.global_step >= self.state.max_steps:
            return (
                [],
                None,
            )  # goes on from its last checkpoint; transformers would take one step more
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.prepare_batches(batches)
        self._step = []
        packs = [len(self._packs(batch["interactions"])) for batch in batches]
        items = sum(self._count(batch["interactions"]) for batch in batches)
        if self.args.world_size == 1:
            return batches, torch.tensor(items, device=device)
        mine = torch.tensor([[items, *packs]], device=device)
        counted = self.accelerator.gather(mine)
        if self._sharded:
            for batch, passes in zip(batches, counted[:, 1:].amax(0).tolist()):
                batch["passes"] = passes
        return batches, counted[:, 0].sum()

    def prepare_batches(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of one optimizer step with their ``interactions``; a hook for subclasses."""
        return batches

    def idle_interaction(self) -> TokenizedInteraction:
        """What a process without interactions runs the model on, with weight 0."""
        return self.train_dataset[0]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss of a micro-batch; its gradient is added, pack by pack."""
        if self.args.world_size > 1 and not is_wrapped(model):
            raise RuntimeError(
                f"SDPOTrainer: with {self.args.world_size} processes the model must be wrapped by DDP, "
                f"FSDP or DeepSpeed, got {type(model).__name__}: each process would train a model of "
                "its own. Was it prepared before train()?"
            )
        packs = self._packs(inputs["interactions"])
        # A process without interactions (at the end of an epoch), or with fewer passes than another,
        # runs the model all the same, with weight 0.
        idle = [self.idle_interaction()]
        empty = max(1, inputs.get("passes", 0)) - len(packs)
        passes = [(pack, num_items_in_batch) for pack in packs]
        passes += [(idle, None)] * max(0, empty)
        total: Tensor | None = None
        for number, (pack, divisor) in enumerate(passes):
            last = number == len(passes) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss = super().training_step(model, {"interactions": pack}, divisor)
            total = loss if total is None else total + loss
        assert total is not None
        return total

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
        interactions = inputs["interactions"]
        idle = num_items_in_batch is None
        loss, statistics = self.run_pass(model, interactions, 1 if idle else num_items_in_batch)
        if idle:
            loss = loss * 0.0
        else:
            self._record(interactions, statistics)
            loss = loss * self.accelerator.num_processes
        return (loss, statistics) if return_outputs else loss

    def _new_metrics(self) -> SignalMetrics:
        return SignalMetrics(
            reference_kl=self.args.reference_kl > 0,
            divergence=self.args.mode != "sampled_token",
        )

    def _record(self, interactions: Sequence[TokenizedInteraction], statistics: TokenStatistics) -> None:
        ends, row, sequences = [], -1, 0
        for item in interactions:
            row += len(item.completion_ids)
            ends.append(row if self._ended(item) else -1)
            sequences += len(item.prompt_ids) + len(item.teacher_prompt_ids)
            sequences += 2 * len(item.completion_ids)
        ends = torch.tensor(ends, device=statistics.counts.device)
        self._metrics.add(statistics, ends, computed=self._computed, sequences=sequences)
        self._step.append((list(interactions), statistics.sequence_loss))

    def _ended(self, item: TokenizedInteraction) -> bool:
        """Whether the answer's last token ends the turn (else the answer was cut)."""
        tokenize = self._tokenizer_for_check
        return tokenize is None or item.completion_ids[-1] == tokenize.end_of_turn_id

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        grouped = args.group_by_conversation
        if grouped is None:
            grouped = self.sharing == "conversation"
        self._sampler = GroupSampler(
            dataset.groups(grouped),
            multiple=self._train_batch_size * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        return self._sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args, trained = self.args, [p for p in self.model.parameters() if p.requires_grad]
        optim = str(getattr(args.optim, "value", args.optim))
        given = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        if given is None:
            update = choose_update(args.weight_update, optim, {p.dtype for p in trained})
            if optim in TORCHAO:
                cls, settings = self.get_optimizer_cls_and_kwargs(args, self.model)
                settings["bf16_stochastic_round"] |= update == "stochastic_rounding"
                self.optimizer_cls_and_kwargs = (seeded(cls, args.seed), settings)
            elif update != "plain":
                settings = {
                    "lr": args.learning_rate,
                    "betas": (args.adam_beta1, args.adam_beta2),
                    "eps": args.adam_epsilon,
                    "rounding": update,
                    "seed": args.seed,
                }
                self.optimizer_cls_and_kwargs = (AdamWBF16, settings)
            name = f"optim={optim!r}"
        else:
            name = f"the optimizer {type(given).__name__}"
            keeps = isinstance(given, AdamWBF16) or getattr(given, "bf16_stochastic_round", False)
            update = args.weight_update if keeps else "plain"
            if args.weight_update not in ("auto", update):
                raise ValueError(
                    f"SDPOTrainer: weight_update must be 'auto' or 'plain' with {name}, which was "
                    f"given, got {args.weight_update!r}; pass optim instead of optimizers"
                )
        lossy = next((p.dtype for p in trained if p.dtype in (torch.bfloat16, torch.float16)), None)
        if args.weight_update == "auto" and update == "plain" and lossy is not None:
            logger.warning("%s", lost_steps(name, lossy, args.learning_rate))
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def check_finite(self) -> None:
        """Before the optimizer's step: stops, or drops the gradients so that it changes nothing."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        local = [getattr(g, "_local_tensor", g) for g in grads]
        checked = [statistics.isfinite().all() for _, statistics in self._step]
        if local and not self.args.fp16:  # a loss scaler sees to overflowing gradients itself
            checked.append(torch.stack(torch._foreach_norm(local)).isfinite().all())
        if not checked:
            checked.append(torch.ones((), dtype=torch.bool, device=self.args.device))
        bad = 1.0 - torch.stack([c.to(self.args.device) for c in checked]).all().float()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if float(bad) == 0:
            return
        what, offenders = self._find_offenders()
        if self.args.world_size > 1:
            found = gather_object([(what, offenders)])
            certain = [names for what, names in found if what == "the loss"]
            what = "the loss" if certain else "the gradient"
            chosen = certain or [names for _, names in found]
            offenders = [name for names in chosen for name in names]
        step = self.state.global_step + 1
        names = ", ".join(offenders[:10]) + (", ..." if len(offenders) > 10 else "")
        message = f"step {step}: {what} is not finite; interactions: {names}"
        if self.args.non_finite == "stop":
            raise NonFiniteError(f"SDPOTrainer: {message}. Set non_finite='skip' to leave such steps out")
        logger.warning("skipped %s", message)
        self.skipped_steps += 1
        for parameter in self.model.parameters():
            parameter.grad = None

    def _find_offenders(self) -> tuple[str, list[str]]:
        """What is not finite in this process's step: ("loss" or "gradient", interactions)."""

        def name(item: TokenizedInteraction) -> str:
            return repr(item.id) if item.id is not None else f"one of {len(item.completion_ids)} tokens"

        losses = [
            (item, float(value))
            for interactions, values in self._step
            for item, value in zip(interactions, values.tolist())
        ]
        bad = [name(item) for item, value in losses if not math.isfinite(value)]
        if bad:
            return "the loss", bad
        if self.args.world_size > 1:  # the processes' gradients are summed by now
            return "the gradient", [name(item) for item, _ in losses]
        # The loss is fine and its gradient is not: one interaction at a time shows whose it is.
        kept = [(p, p.grad) for p in self.model.parameters()]
        for item, _ in losses:
            self.model.zero_grad()
            loss, _ = self.run_pass(self.model, [item], self._count([item]))
            loss.backward()
            grads = [p.grad for p, _ in kept if p.grad is not None]
            if not torch.stack(torch._foreach_norm(grads)).isfinite().all():
                bad.append(name(item))
        for parameter, grad in kept:
            parameter.grad = grad
        return "the gradient", bad or [name(item) for item, _ in losses]

    # ------------------------------------------------------------------------------- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; before training too, but not under FSDP2.

        The loader that it prepares is not kept: accelerate holds on to each of them, and with it to
        the indices of the whole set. Nor is what marks the model as prepared: accelerate would
        return it as it is when training begins, and nothing would average the gradients of several
        processes (accelerate 1.15).

        Raises:
            NotImplementedError: before training under FSDP2, which shards a model only together with
                its optimizer.
        """
        accelerator, model = self.accelerator, self.model
        first = not accelerator._models and not self.is_in_train
        if first and getattr(accelerator, "is_fsdp2", False):
            raise NotImplementedError(
                "SDPOTrainer: evaluate() before train() is not possible under FSDP2; set "
                "eval_on_start=True, which evaluates before the first step"
            )
        loaders, forward = len(accelerator._dataloaders), vars(model).get("forward")
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            del accelerator._dataloaders[loaders:]
            if first and not self._sharded:
                accelerator._models.clear()
                for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
                    vars(model).pop(name, None)
                if forward is not None:
                    vars(model)["forward"] = forward

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is not None and not isinstance(eval_dataset, (str, InteractionDataset)):
            eval_dataset = self._dataset(self.args, eval_dataset, self.processing_class, "eval_dataset")
        if eval_dataset is not self.train_dataset:  # else the loss in training is asked for
            self._check_held_out(self.args, self.train_dataset, eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> GroupSampler:
        return GroupSampler(
            eval_dataset.groups(self.sharing == "conversation"),
            multiple=self.args.eval_batch_size * self.args.world_size,
            shuffle=False,
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds a batch to the evaluation's sums; returns its loss sum, which `evaluation_loop` drops."""
        interactions = inputs["interactions"]
        packs = self._packs(interactions)
        idle = 0
        if self._sharded:
            mine = torch.tensor([len(packs)], device=self.args.device)
            idle = int(self.accelerator.gather(mine).max()) - len(packs)
        with torch.no_grad(), self.compute_loss_context_manager():
            for pack in packs:
                loss, statistics = self.run_pass(model, pack, 1)
                self._eval_sums[0] += loss.double()
                self._record(pack, statistics)
            for _ in range(idle):
                self.run_pass(model, [self._idle], 1)
        self._eval_sums[1] += self._count(interactions)
        return self._eval_sums[0].float(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The loss over the whole set, normalized as in training, and the signal's statistics."""
        training = self._metrics
        self._metrics = self._new_metrics()
        step, self._step = self._step, []
        self._idle = dataloader.dataset[0]
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            loss, items = self._reduce_sum(self._eval_sums.cpu()).tolist()
            metrics = self._metrics.flush(reduce_sum=self._reduce_sum, gather=self._gather)
        finally:
            self._metrics, self._step = training, step
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(1.0, items)
        for name, value in metrics.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _reduce_sum(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), "sum").cpu()

    def _gather(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        values = values.to(self.args.device)
        padded = self.accelerator.pad_across_processes(values, pad_index=float("nan"))
        gathered = self.accelerator.gather(padded).cpu()
        return gathered[~gathered.isnan()]

    # ------------------------------------------------------------------------ checkpoints, logs

    def _teachers(self) -> dict[str, TeacherWeights]:
        teachers = {"ema": self._ema, "frozen": self._frozen}
        return {name: weights for name, weights in teachers.items() if weights is not None}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            for name, weights in self._teachers().items():
                weights.save(os.path.join(output_dir, TEACHER_FILE.format(name)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for name, weights in self._teachers().items():
                weights.load(os.path.join(checkpoint, TEACHER_FILE.format(name)))

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
                    delete_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
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

        def size(parameters: Any) -> int:
            return sum(p.numel() * p.element_size() for p in parameters)

        trained = [p for p in self.model.parameters() if p.requires_grad]
        saved = size(trained) if is_peft(self.model) else size(self.model.parameters())
        needed = saved if model else 0
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            moments = str(getattr(self.args.optim, "value", self.args.optim)) in ADAMW
            teachers = sum(size(teacher.values.values()) for teacher in self._teachers().values())
            needed += saved + teachers + (2 * size(trained) if moments else 0)
        check_output_folder(self.args.output_dir, needed)

    def find_checkpoint(self) -> str | None:
        """The newest whole checkpoint of the output folder, the same in all processes.

        Damaged ones are named in a warning.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        found = [find_checkpoint(self.args.output_dir)] if self.args.process_index == 0 else [None]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        path, damaged = found[0]  # type: ignore[misc]
        if path is None and damaged:
            raise ValueError(f"SDPOTrainer: no checkpoint is whole: {'; '.join(damaged)}")
        if self.args.process_index == 0:
            for problem in damaged:
                logger.warning("%s; going on from %s", problem, path)
        return path

    def _check_checkpoint(self, checkpoint: str | os.PathLike) -> None:
        """Raises ValueError, in all processes, where the checkpoint is damaged."""
        problem = [damage_of(checkpoint) if self.args.process_index == 0 else None]
        if self.args.world_size > 1:
            broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(f"SDPOTrainer: checkpoint {checkpoint} is damaged: {problem[0]}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs.update(self._metrics.flush(reduce_sum=self._reduce_sum, gather=self._gather))
            if self.args.non_finite == "skip":
                logs["sdpo/skipped_steps"] = float(self.skipped_steps)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------- the teacher check

    def check_teacher(self, interactions: int | None = None) -> TeacherCheck | None:
        """What hindsight does to a sample of the training data; None where there is no text.

        Args:
            interactions: how many to look at; None: ``args.teacher_check``.
        """
        count = self.args.teacher_check if interactions is None else interactions
        sample = [] if self.train_dataset is None else self.train_dataset.sample[:count]
        if len(sample) < 2 or self._tokenizer_for_check is None:
            return None

        def log_ratios(items: list[TokenizedInteraction]) -> list[Tensor]:
            ratios = []
            with torch.no_grad():
                for item in items:
                    _, statistics = self.run_pass(self.model, [item], 1)
                    ratios.append(statistics.log_ratio[statistics.counts].float().cpu())
            return [ratio if len(ratio) else torch.zeros(1) for ratio in ratios]

        training = self.model.training
        self.model.eval()
        try:
            return teacher_check(sample, self._tokenizer_for_check, log_ratios)
        finally:
            self.model.train(training)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`, after a look at the teacher and the output folder.

        Args:
            resume_from_checkpoint: a folder; or True for the output folder's newest whole
                checkpoint.

        Raises:
            OSError: the output folder cannot take a checkpoint, at the start or later.
            ValueError: the checkpoint is damaged, or there is none.
            NonFiniteError: a loss or gradient is not finite (``non_finite="stop"``).
        """
        if self.args.save_strategy != "no":
            self.check_output()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.find_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"SDPOTrainer: {self.args.output_dir} holds no checkpoint")
        elif resume_from_checkpoint:
            self._check_checkpoint(resume_from_checkpoint)
        keep_date(self.args, resume_from_checkpoint or None)
        # A model that is sharded already (a second call) would have to run in all processes.
        whole = not (self._sharded and is_wrapped(self.model_wrapped))
        if self.args.teacher_check and whole and self.is_world_process_zero():
            check = self.check_teacher()
            if check is not None:
                logger.log(logging.WARNING if check.warning else logging.INFO, "%s", check)
        return super().train(resume_from_checkpoint, *args, **kwargs)


class _StepCallback(TrainerCallback):
    """What has to happen at certain points of `transformers.Trainer`'s loop."""

    def __init__(self, trainer: SDPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._metrics.reset()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self.trainer.check_finite()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {self.trainer.save_before_stop()}") from None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._ema is not None:
            self.trainer._ema.update(args.ema_rate)
