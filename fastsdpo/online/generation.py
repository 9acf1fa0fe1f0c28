"""Samples the answers of a run: in the training processes, or on a server that receives the weights."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

from fastsdpo.online.sampling import Sample, ServerSampler, generate
from fastsdpo.online.weight_transfer import WeightTransfer
from fastsdpo.trainer.adapters import is_peft
from fastsdpo.trainer.whole_weights import trained_values, unsharded

if TYPE_CHECKING:
    from fastsdpo.online.trainer import OnlineSDPOTrainer


class Generation:
    """Samples answers with the trainer's current weights, in all processes at once.

    Without a server each process answers its own prompts; weights that FSDP2 has sharded are gathered in each
    process for that time. With a server, the weights are sent to it if they have changed since the last time.

    Raises:
        ValueError: the server cannot take these weights.
        NotImplementedError: the weights are sharded in a way that cannot be sampled from.
        ImportError, ConnectionError: as for `ServerSampler` and `WeightTransfer`.
    """

    def __init__(self, trainer: OnlineSDPOTrainer):
        args = trainer.args
        if trainer.learner.sharded == "zero3":
            raise NotImplementedError(
                "OnlineSDPOTrainer: DeepSpeed ZeRO-3 holds each weight in parts, from which answers cannot be "
                "sampled; use DDP, FSDP2 or DeepSpeed ZeRO-2"
            )
        self.trainer = trainer
        self.end_ids = trainer.tokenize.end_ids(self.model)
        self.server: ServerSampler | None = None
        self.transfer: WeightTransfer | None = None
        self._given = -1  # the step whose weights the server has
        if args.generation_url is None:
            return
        if (args.generation_sync == "lora") != is_peft(trainer.model) and args.generation_sync != "none":
            raise ValueError(
                "OnlineSDPOTrainer: generation_sync='lora' needs an adapter (peft_config), and 'weights' a model "
                "without one"
            )
        folder = os.path.join(args.output_dir or "", "adapters")
        self.server = ServerSampler(args.generation_url, args.generation_model, folder=folder)
        if args.generation_sync == "weights":
            self.transfer = WeightTransfer(self.server, trainer.args.process_index)

    @property
    def model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        seed: str,
        max_new_tokens: int,
        temperature: float | None,
        here: bool = False,
    ) -> list[Sample]:
        """One answer per prompt. All processes must call it, also those without prompts.

        Args:
            seed: of the draws, and of nothing else.
            here: by `generate`, though there may be a server.
        """
        args = self.trainer.args
        drawing: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "end_ids": self.end_ids,
        }
        if self.server is None or here:
            with unsharded(self.model):
                if not prompts:
                    return []
                return generate(self.model, prompts, batch_size=args.generation_batch_size, seed=seed, **drawing)
        self.give_weights()
        return self.server.sample(prompts, seed=random.Random(seed).getrandbits(31), **drawing) if prompts else []

    def give_weights(self) -> None:
        """Sends the current weights to the server if they have changed. All processes must call it."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if trainer.args.generation_sync == "none" or step == self._given:
            return
        assert self.server is not None
        if self.transfer is not None:
            self.transfer.send(self.model, trainer.accelerator.wait_for_everyone)
        else:
            first, name = trainer.is_world_process_zero(), f"sdpo-{step}"
            values = trained_values(self.model, wanted=first)
            if first:
                self.server.load_adapter(self.model, name, values)
            self.server.use_adapter(name)
            trainer.accelerator.wait_for_everyone()
        self._given = step
