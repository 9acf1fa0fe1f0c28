"""`SDPOConfig`: `transformers.TrainingArguments` and the settings of SDPO, and its presets."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from datetime import datetime
from numbers import Real
from typing import Any

import torch
from transformers import TrainingArguments

from fastsdpo.modeling import DTYPES
from fastsdpo.settings import OnlineSDPOSettings
from fastsdpo.settings import SDPOSettings as SDPOSettings
from fastsdpo.trainer.inherited import ONLY as ONLY
from fastsdpo.trainer.inherited import check_accelerator, check_inherited, check_types
from fastsdpo.trainer.launch import check_deepspeed, check_launch
from fastsdpo.trainer.liger import check_liger_settings
from fastsdpo.trainer.presets import PRESETS as PRESETS
from fastsdpo.trainer.presets import (
    checkpointing_given,
    default_bf16,
    gpu_has_bf16,
    gpu_is_there,
    split_batch,
    with_preset,
)

TOKENIZER_OPTIONS = (
    "max_prompt_length",
    "max_completion_length",
    "max_followup_length",
    "truncation",
    "end_of_turn",
    "chat_template_kwargs",
    "chat_template_date",
    "allow_special_tokens",
    "neutral_followup",
)


@dataclass
class SDPOConfig(SDPOSettings, TrainingArguments):
    """All settings of a run: those of `SDPOSettings`, and every one of `transformers.TrainingArguments`.

    One optimizer step trains on ``global_batch_size`` interactions, however many processes share
    them; without it on ``per_device_train_batch_size * gradient_accumulation_steps * processes``. How
    they are split changes memory and speed, not the result.
    ``SDPOConfig.preset("paper", output_dir=...)`` is the published offline recipe.

    Changed defaults of TrainingArguments: ``bf16`` on GPUs that have it, and two data loader workers there;
    ``learning_rate=2e-6``, ``lr_scheduler_type="cosine"``, ``warmup_steps=0.05`` (a share),
    ``num_train_epochs=2``: the paper's; ``logging_steps=10`` and ``logging_first_step``, so that every run shows
    a loss, and the last step is logged; ``remove_unused_columns`` and ``logging_nan_inf_filter`` off (the latter
    waits for the GPU in every micro-step; see ``non_finite``); ``ddp_broadcast_buffers`` off (language models have
    constant buffers).

    Settings of TrainingArguments that cannot work here, or that nothing would follow, have to keep
    their defaults (`fastsdpo.trainer.inherited.ONLY`): ``torch_compile``, ``label_smoothing_factor``,
    ``auto_find_batch_size``, ``train_sampling_strategy``, ...
    """

    def __post_init__(self):
        check_types(self, self._check)
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # transformers compares it with 0
        self._check_fixed()
        check_inherited(self, self._check)
        self._check_method()
        self._check_text()
        self._checkpointing_given = checkpointing_given(self)
        self._bf16_given = self.bf16 is not None
        if self.bf16 is None:
            self.bf16 = default_bf16(self.dtype, self.fp16, gpu_has_bf16(self.use_cpu))
        self._workers_given = self.dataloader_num_workers is not None
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if gpu_is_there(self.use_cpu) else 0
        # Before the processes have met, since plugins read the batch sizes in super().__post_init__;
        # launchers other than torchrun and accelerate tell their number only there.
        processes = int(os.environ.get("WORLD_SIZE", 1))
        batch = self.per_device_train_batch_size, self.gradient_accumulation_steps
        self._split_global_batch(processes, *batch)
        check_launch(self)
        super().__post_init__()
        check_deepspeed(self)
        check_accelerator(self.accelerator_config)
        self._check(not self.fp16 or self.device.type != "cpu", "fp16", "be False on a CPU, where nothing follows it")
        if self.sync_each_pass:  # transformers asks accelerate before a micro-batch
            given = self.accelerator_config.gradient_accumulation_kwargs or {}
            self.accelerator_config.gradient_accumulation_kwargs = {**given, "sync_each_batch": True}
        check_liger_settings(self.use_liger_kernel, self.liger_kernel_config, self.device)
        if self.world_size != processes:
            self._split_global_batch(self.world_size, *batch)
        processes = self.world_size
        self._check(processes % self.ulysses == 0, "ulysses", f"divide the number of processes ({processes})")

    def _check_fixed(self) -> None:
        """Settings with few values, or from a smallest on."""
        for item in fields(self):
            if item.name not in OnlineSDPOSettings.__dataclass_fields__:
                continue  # of transformers, which sees to its own
            if "choices" in item.metadata:
                choices = item.metadata["choices"]
                self._check(getattr(self, item.name) in choices, item.name, f"be one of {', '.join(choices)}")
            if "least" in item.metadata or "above" in item.metadata:
                self._check_bound(item.name, item.metadata.get("least"), item.metadata.get("above"))

    def _check_bound(self, name: str, least: int | None, above: int | None) -> None:
        """A number's smallest value, or the largest that is too small."""
        or_none = " or None" * ("None" in str(self.__dataclass_fields__[name].type))
        if or_none and getattr(self, name) is None:
            return
        value: Any = getattr(self, name)
        self._check(isinstance(value, Real), name, f"be a number{or_none}")
        if above is not None:
            self._check(value > above, name, f"be > {above}{or_none}")
        if least is not None:
            self._check(value >= least, name, f"be {f'at least {least}' if least else '>= 0'}{or_none}")

    def _check_method(self) -> None:
        check = self._check
        check(0 <= self.alpha <= 1, "alpha", "be in [0, 1]")
        check(self.mode != "sampled_token" or self.alpha == 1, "alpha", "be 1 with mode='sampled_token'")
        check((self.topk is not None) == (self.mode == "topk"), "topk", "be given with mode='topk', and only there")
        check(self.topk != 1 or self.add_tail, "topk", "be at least 2 without add_tail: one token alone is certain")
        check(0 < self.ema_rate <= 1, "ema_rate", "be in (0, 1]")
        check(0 <= self.trust_region_mix <= 1, "trust_region_mix", "be in [0, 1]")
        guided_region = self.is_guided and self.teacher == "trust_region"
        check(not guided_region, "teacher", "be live, ema or frozen with guidance or neutral_followup")

    def _check_text(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        self._check(self.dtype in (None, "auto", *DTYPES), "dtype", f"be auto, {', '.join(DTYPES)} or None")
        neutral = self.neutral_followup
        self._check(neutral is None or bool(neutral.strip()), "neutral_followup", "have a text, or be None")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if self.chat_template_date is not None:
            try:
                datetime.fromisoformat(self.chat_template_date)
            except (TypeError, ValueError):
                self._check(False, "chat_template_date", "be a date like 2026-01-31")

    def _split_global_batch(self, processes: int, per_device: int, accumulation: int) -> None:
        if self.global_batch_size is not None:
            self.per_device_train_batch_size, self.gradient_accumulation_steps = split_batch(
                self.global_batch_size, processes, per_device, accumulation
            )

    def _check(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"SDPOConfig: {name} must {rule}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str, **settings: Any) -> SDPOConfig:
        """A preset, and changes to it.

        Args:
            name: "full" (the defaults: matches the hindsight policy by the reverse KL over the whole vocabulary;
                another objective than the paper's runs, see docs/objectives.md), "paper" (the published offline
                recipe, own-answer hindsight: sampled token, live teacher, the first two tokens left out, learning
                rate 2e-6, cosine, 32 interactions a step, gradient clip 10) or
                "paper-later" (the objective and steps of the code published later: top 20 and the rest, one
                interaction a step, 5e-6).
            settings: a batch of one's own (``per_device_train_batch_size`` or
                ``gradient_accumulation_steps``) replaces the preset's ``global_batch_size``.
        """
        if name not in PRESETS:
            raise ValueError(f"SDPOConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**with_preset(PRESETS[name], settings))

    def tokenizer_options(self) -> dict[str, Any]:
        """The keyword arguments of `fastsdpo.data.InteractionTokenizer`."""
        return {name: getattr(self, name) for name in TOKENIZER_OPTIONS}

    @property
    def order_seed(self) -> int:
        """Decides the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def is_guided(self) -> bool:
        """Whether the teacher is another than p(. | x, o)."""
        return self.guidance != 1 or self.neutral_followup is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the initial model's probabilities of the answer (without follow-up) are used."""
        return self.reference_kl > 0 or self.is_clip is not None
