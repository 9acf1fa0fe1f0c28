"""`OnlineSDPOConfig`: the settings of `SDPOConfig`, and those of sampling answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastsdpo.online.presets import PRESETS
from fastsdpo.settings import OFFLINE
from fastsdpo.settings import OnlineSDPOSettings as OnlineSDPOSettings
from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.inherited import BY_LOSS
from fastsdpo.trainer.presets import with_preset


@dataclass
class OnlineSDPOConfig(OnlineSDPOSettings, SDPOConfig):
    """All settings of an online run.

    One optimizer step samples ``global_batch_size`` prompts (without it
    ``per_device_train_batch_size * gradient_accumulation_steps * processes``), ``num_generations``
    answers each, asks the user about each answer, and trains on the interactions that have a
    follow-up. ``OnlineSDPOConfig.preset("paper", output_dir=...)`` is the published online recipe.

    ``is_clip`` weighs tokens by ``min(p_student / p_sampling, is_clip)`` here. ``p_sampling`` is the
    token's probability when the answer was sampled, not under the initial model as in `SDPOConfig`.

    Changed defaults of `SDPOConfig`: ``learning_rate=5e-6``,
    ``lr_scheduler_type="constant"``, ``warmup_steps=0``, ``max_grad_norm=1``,
    ``num_train_epochs=1``, ``logging_steps=1``, ``teacher_check=0`` (there is no follow-up to check
    before the first answer).
    """

    def _check_method(self) -> None:
        super()._check_method()
        clip = self.ppo_clip
        self._check(clip is None or 0 < clip < 1, "ppo_clip", "be in (0, 1) or None")
        self._check(clip is None or self.mode == "sampled_token", "ppo_clip", "be None unless mode='sampled_token'")
        self._check(clip is None or self.is_clip is None, "is_clip", "be None with ppo_clip")
        self._check(not self.center_advantages or clip is not None, "center_advantages", "be off without ppo_clip")
        share = self.stop_when_degenerate
        self._check(share is None or 0 < share <= 1, "stop_when_degenerate", "be in (0, 1] or None")
        self._check(0 <= self.min_entropy_share < 1, "min_entropy_share", "be in [0, 1)")
        for name in OFFLINE:
            usual = self.__dataclass_fields__[name].default
            self._check(getattr(self, name) == usual, name, f"be {usual!r}: it is of logged interactions (SDPOConfig)")
        best, schedule = self.metric_for_best_model, getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if self.load_best_model_at_end or schedule in BY_LOSS:
            rule = "name a figure of held-out answers, such as satisfaction: there is no held-out loss"
            self._check(best not in (None, "loss", "eval_loss"), "metric_for_best_model", rule)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> OnlineSDPOConfig:
        """Makes a config from a preset, with changes.

        Args:
            name: one of these presets.
                "full" matches the hindsight policy: the reverse KL over the whole vocabulary. This objective
                is not that of the paper's runs, see docs/objectives.md.
                "paper" is the published online recipe for follow-ups to the model's own answers: sampled token,
                PPO clip 0.2, mean-centered advantages, constant learning rate 5e-6, 16 prompts a step over all
                processes.
                "personal" is this package's own recipe for one user's wish: the reverse KL to a frozen
                teacher with guidance 2, for a LoRA adapter of rank 16.
                "paper-later" is the recipe of the code published later: the reverse KL over the top 20 tokens
                and the rest, one interaction a batch, several steps on it, learning rate 5e-6. It needs a LoRA
                adapter of rank 256.
            settings: as for `SDPOConfig.preset`.
        """
        if name not in PRESETS:
            raise ValueError(f"OnlineSDPOConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**with_preset(PRESETS[name], settings))

    @property
    def needs_reference(self) -> bool:
        """Whether training reads the initial model's distribution (without the follow-up)."""
        return self.reference_kl > 0
