"""`OnlineSDPOConfig`: the settings of `SDPOConfig`, and how answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.presets import LATER, with_preset

# The published online recipe of https://arxiv.org/abs/2603.12273.
PAPER: dict[str, Any] = {
    "mode": "sampled_token",
    "alpha": 1.0,
    "teacher": "live",
    "ppo_clip": 0.2,
    "center_advantages": True,
    "normalization": "sequence",
    "template": "online-v1",
    "sampling_temperature": 1.0,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "global_batch_size": 16,
    "per_device_train_batch_size": 16,  # at most
    "max_grad_norm": 1.0,
}

# Matches the hindsight policy: the reverse KL over the whole vocabulary, on sampled answers (equation 2). It is
# another objective than the paper's runs have (docs/objectives.md).
FULL: dict[str, Any] = {"mode": "full", "alpha": 1.0}

# Ours: what learned one user's wish from complaints with a small model (docs/online.md). Its rate is for a
# LoRA adapter of rank `PERSONAL_LORA`; the teacher is a fixed target.
PERSONAL: dict[str, Any] = {
    "mode": "full",
    "alpha": 1.0,
    "teacher": "frozen",
    "guidance": 2.0,
    "neutral_followup": "Okay.",
    "template": "note",
    "sampling_temperature": 0.5,
    "max_new_tokens": 48,
    "eval_max_new_tokens": 96,
    "learning_rate": 3.5e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "global_batch_size": 16,
    "per_device_train_batch_size": 16,  # at most
    "max_grad_norm": 1.0,
}
PERSONAL_LORA = 16

# What the code published later has; how many steps it takes on each interaction is not known to us.
LATER_ONLINE: dict[str, Any] = {**LATER, "template": "online-v1", "sampling_temperature": 1.0, "updates_per_batch": 4}

PRESETS = {"paper": PAPER, "full": FULL, "personal": PERSONAL, "paper-later": LATER_ONLINE}


@dataclass
class OnlineSDPOConfig(SDPOConfig):
    """All settings of an online run.

    One optimizer step samples ``global_batch_size`` prompts (without it
    ``per_device_train_batch_size * gradient_accumulation_steps * processes``), ``num_generations``
    answers each, asks the user about each answer, and trains on the interactions that have a
    follow-up. ``OnlineSDPOConfig.preset("paper", output_dir=...)`` is the published online recipe.

    ``is_clip`` weighs tokens by ``min(p_student / p_sampling, is_clip)`` here: the answers' own
    sampling-time probabilities, not the initial model's.

    Changed defaults of `SDPOConfig`: ``learning_rate=5e-6``,
    ``lr_scheduler_type="constant"``, ``warmup_steps=0``, ``max_grad_norm=1``,
    ``num_train_epochs=1``, ``logging_steps=1``, ``teacher_check=0`` (there is no follow-up to check
    before the first answer).
    """

    # Answers
    num_generations: int = field(default=1, metadata={"help": "Answers sampled per prompt."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    sampling_temperature: float | None = field(
        default=1.0,
        metadata={
            "help": "Of the answers. Only at 1 are they the model's own distribution. None: as "
            "the model's generation config samples, with its top-k, top-p and penalties."
        },
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Answers sampled at once; None: all of a step."}
    )
    eval_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of a held-out answer; None: max_new_tokens."}
    )
    eval_temperature: float = field(default=0.0, metadata={"help": "Of held-out answers; 0: the likeliest token."})
    generation_url: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible server (vLLM) that samples the answers; None: generate."},
    )
    generation_model: str | None = field(
        default=None, metadata={"help": "The model's name on that server; None: its first."}
    )
    generation_sync: str = field(
        default="lora",
        metadata={
            "help": "How the server gets the trained weights: lora (the adapter is loaded by name at each step), "
            "weights (all of them, by vLLM's weight transfer), or none (its answers are off-policy; use is_clip or "
            "ppo_clip)."
        },
    )

    # The online objective
    updates_per_batch: int = field(default=1, metadata={"help": "Optimizer steps on each batch of sampled answers."})
    ppo_clip: float | None = field(
        default=None,
        metadata={
            "help": "mode=sampled_token: clip the probability ratio to sampling time to 1 +- this. None: no ratio."
        },
    )
    center_advantages: bool = field(
        default=False,
        metadata={
            "help": "With ppo_clip: subtract each answer's mean advantage. The loss is logged "
            "without that, since it would be 0."
        },
    )

    # Safety
    stop_when_degenerate: float | None = field(
        default=None,
        metadata={
            "help": "Stop, with a checkpoint, where this share of the answers of the last "
            "degenerate_window interactions is degenerate. None: report only."
        },
    )
    degenerate_window: int = field(
        default=32, metadata={"help": "Interactions that stop_when_degenerate looks back on."}
    )
    min_entropy_share: float = field(
        default=0.2,
        metadata={"help": "Entropy collapse: below this share of the first window's entropy."},
    )
    log_interactions: bool = field(
        default=True,
        metadata={"help": "Write interactions.jsonl and eval_answers.jsonl to the output folder."},
    )

    # Changed defaults
    teacher_check: int = field(
        default=0, metadata={"help": "Not used: there is no follow-up to check before the first answer."}
    )
    dataloader_num_workers: int | None = field(
        default=0, metadata={"help": "Processes that load prompts; packs are made where the answers are."}
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "The largest learning rate of the run."})
    lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "How the learning rate changes over the run: cosine, constant, linear, ..."},
    )
    warmup_steps: float = field(
        default=0, metadata={"help": "Steps in which the learning rate rises from 0; below 1, a share of all steps."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prompts."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are scaled down to this norm; 0: they are not."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Steps between two logs of the loss; below 1, a share of all steps."}
    )

    def __post_init__(self):
        for name in ("num_generations", "max_new_tokens", "updates_per_batch", "degenerate_window"):
            self._check(getattr(self, name) >= 1, name, "be at least 1")
        longest = self.eval_max_new_tokens
        self._check(longest is None or longest >= 1, "eval_max_new_tokens", "be at least 1 or None")
        size = self.generation_batch_size
        self._check(size is None or size >= 1, "generation_batch_size", "be at least 1 or None")
        warm = self.sampling_temperature
        self._check(warm is None or warm > 0, "sampling_temperature", "be > 0 or None")
        self._check(self.eval_temperature >= 0, "eval_temperature", "be >= 0")
        self._check(self.generation_sync in ("lora", "weights", "none"), "generation_sync", "be lora, weights or none")
        clip = self.ppo_clip
        self._check(clip is None or 0 < clip < 1, "ppo_clip", "be in (0, 1) or None")
        self._check(clip is None or self.mode == "sampled_token", "ppo_clip", "be None unless mode='sampled_token'")
        self._check(clip is None or self.is_clip is None, "is_clip", "be None with ppo_clip")
        self._check(not self.center_advantages or clip is not None, "center_advantages", "be off without ppo_clip")
        share = self.stop_when_degenerate
        self._check(share is None or 0 < share <= 1, "stop_when_degenerate", "be in (0, 1] or None")
        self._check(0 <= self.min_entropy_share < 1, "min_entropy_share", "be in [0, 1)")
        self.teacher_check = self.measure_interactions = self.measure_answers = 0
        super().__post_init__()

    @classmethod
    def preset(cls, name: str, **settings: Any) -> OnlineSDPOConfig:
        """A preset, and changes to it.

        Args:
            name: "full" (matches the hindsight policy: the reverse KL over the whole vocabulary;
                another objective than the paper's runs, see docs/objectives.md) or "paper" (the
                published online recipe, own-answer hindsight:
                sampled token, PPO clip 0.2, mean-centered advantages, learning rate 5e-6, constant,
                16 prompts a step over all processes), "personal" (ours, for one user's wish: the
                reverse KL to a frozen teacher with guidance 2, for a LoRA adapter of rank 16) or
                "paper-later" (that of the code published later: reverse KL over the top 20 and the rest, one
                interaction a batch, several steps on it, learning rate 5e-6; give it a LoRA of rank 256).
            settings: as for `SDPOConfig.preset`.
        """
        if name not in PRESETS:
            raise ValueError(f"OnlineSDPOConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**with_preset(PRESETS[name], settings))

    @property
    def needs_reference(self) -> bool:
        """Whether the initial model's distribution (without the follow-up) is used."""
        return self.reference_kl > 0
