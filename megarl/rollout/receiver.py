"""The end of a push in a worker of a vLLM server, in another process: vLLM's own weight-transfer API, with a backend of
ours that works on CPUs too.

Start the server with ``--worker-extension-cls megarl.rollout.receiver.Receiver`` and ``--weight-transfer-config
'{"backend": "megarl"}'``: vLLM imports this module in every worker before it loads a model, which registers the
backend. What `megarl.rollout.vllm_config.model_arguments` says of the model belongs on the command line too. The other
end is `megarl.rollout.remote`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from megarl.rollout import vllm_model, wire
from megarl.weights.checksums import checksum


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the groups meet, and this engine's place in them."""

    host: str
    port: int
    first_rank: int
    size: int
    timeout_s: float
    senders: int  # each has a group of its own, with all engines


@dataclass
class Announced(WeightTransferUpdateInfo):
    """What comes, in order (`megarl.rollout.wire`)."""

    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    senders: list[int]  # which one each tensor comes from
    bucket_bytes: int
    verify: bool  # whether each bucket is followed by its checksum


class Transfer(WeightTransferEngine[Meeting, Announced]):
    """Weights in Hugging Face's names and shapes, broadcast in buckets."""

    init_info_cls = Meeting
    update_info_cls = Announced
    groups: Sequence[wire.Group] = ()  # by sender

    def init_transfer_engine(self, init_info: Meeting) -> None:
        self.shutdown()  # a new group takes the place of one that has lost members
        timeout = timedelta(seconds=init_info.timeout_s)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        parallel = self.parallel_config
        rank = init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.groups = [
            wire.Group.join(store, rank, init_info.size, self.device, init_info.timeout_s, sender)
            for sender in range(init_info.senders)
        ]

    def start_weight_update(self) -> None:
        vllm_model.begin_reload(self.model)

    def receive_weights(self, update_info: Announced) -> None:
        """Raises where the sender is lost, or (``verify``) a bucket is not what was sent. The weights are then good for
        nothing, but the next push finds a model that can be loaded."""
        try:
            vllm_model.load(self.model, self.vllm_config, self._incoming(update_info))
        except BaseException:
            # Otherwise layers that wait for the rest of their tensors would take the next push's for it.
            vllm_model.end_reload(self.model, self.vllm_config)
            self.shutdown()
            raise

    def _incoming(self, announced: Announced) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.groups:
            raise RuntimeError("weights came before init_weight_transfer_engine")
        metadata = wire.understood(announced.names, announced.shapes, announced.dtypes)
        for sender, share in wire.shares_of(metadata, announced.senders):
            for bucket in wire.buckets_of(share, announced.bucket_bytes):
                buffer, tensors = wire.views(bucket, self.device)
                self.groups[sender].broadcast(buffer)
                if announced.verify:
                    self._verify(bucket, buffer, sender)
                yield from tensors.items()
                del buffer, tensors

    def _verify(self, bucket: wire.Metadata, buffer: torch.Tensor, sender: int) -> None:
        sent = torch.zeros(1, dtype=torch.int64, device=buffer.device)
        self.groups[sender].broadcast(sent)
        if (found := checksum(buffer)) != sent.item():
            names = f"{bucket[0][0]} to {bucket[-1][0]}"
            raise RuntimeError(f"a bucket of weights, {names}, has checksum {found}, but was sent with {sent.item()}")

    def finish_weight_update(self) -> None:
        vllm_model.end_reload(self.model, self.vllm_config)

    def shutdown(self) -> None:
        for group in self.groups:
            group.close()
        self.groups = ()


class Receiver:
    """What vLLM's workers can do beside: called by name, over ``/collective_rpc``."""

    model_runner: Any

    def megarl_checksums(self) -> dict[str, int]:
        return vllm_model.checksums(self.model_runner.get_model())

    def megarl_spoil(self) -> None:
        vllm_model.spoil(self.model_runner.get_model())


WeightTransferEngineFactory.register_engine("megarl", Transfer)
