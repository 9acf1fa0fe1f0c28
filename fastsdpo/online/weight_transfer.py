"""Sends all weights of a model to a running vLLM server, by the trainer's side of vLLM's own weight transfer.

The server is started with ``VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}'``
on GPUs of its own. https://docs.vllm.ai/en/latest/training/weight_transfer/ describes the interface; what is sent
over HTTP and NCCL, and how FSDP2's shards are gathered, is vLLM's code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastsdpo.online.sampling import ServerSampler
from fastsdpo.trainer.processes import agreed

NEEDED = (
    "generation_sync='weights' sends the weights with vLLM's weight transfer, and needs the package vllm beside the "
    "trainer, of a version with vllm.distributed.weight_transfer.WeightTransferTrainerFactory"
)


class WeightTransfer:
    """Sends a model's weights to a vLLM server. The first `send` connects.

    Args:
        rank: the rank of this process. Each process makes one; the first sends, the others help to gather.

    Raises:
        ImportError: the package vllm is missing or too old.
    """

    def __init__(self, server: ServerSampler, rank: int):
        try:
            from vllm.distributed import weight_transfer  # type: ignore[import-not-found]
            from vllm.distributed.weight_transfer import nccl_engine  # type: ignore[import-not-found]
            from vllm.utils import network_utils  # type: ignore[import-not-found]

            self._make = weight_transfer.WeightTransferTrainerFactory.trainer_init
            self._source, self._client = weight_transfer.ModuleSource, weight_transfer.HTTPVLLMWeightSyncClient
            self._init_info = nccl_engine.NCCLTrainerInitInfo
        except (ImportError, AttributeError) as error:
            raise ImportError(f"OnlineSDPOTrainer: {NEEDED}: {error}") from error
        self._network: Any = network_utils
        self.server, self.rank = server, rank
        self.root = server.url.rstrip("/").removesuffix("/v1")
        self._engine: Any = None

    def send(self, model: Any, wait_for_everyone: Callable[[], None]) -> None:
        """Sends the weights; when it returns, the server has those of ``model``. All processes must call it."""
        if self._engine is None:
            self._engine = self._connect(model)
        wait_for_everyone()  # no process waits for answers, which the pause would cut short
        if self.rank == 0:
            self._post("/pause")  # which also drops what it has cached of the weights before
        self._engine.send_weights()
        if self.rank == 0:
            self._post("/resume")
        wait_for_everyone()

    def _connect(self, model: Any) -> Any:
        place = None
        if self.rank == 0:
            workers = self._client_of_root().get("/get_world_size", cast_to=object)["world_size"]
            place = self._network.get_ip(), self._network.get_open_port(), 1 + workers
        address, port, world_size = agreed(place)
        return self._make(
            init_info=self._init_info(master_address=address, master_port=port, world_size=world_size, rank=self.rank),
            client=self._client(self.root),
            source=self._source(model),
        )

    def _post(self, path: str) -> None:
        self._client_of_root().post(path, cast_to=object)

    def _client_of_root(self) -> Any:
        return self.server.client.with_options(base_url=self.root)
