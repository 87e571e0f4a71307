"""A live model as a stream of Hugging Face tensors, in bounded memory: what pushes to vLLM and exports consume.

Ranks exchange blocks of their parameters by a static plan (`megarl.weights.plan`), a bucket at a time
(`megarl.weights.transport`). While a bucket's tensors are used, the next bucket is already on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from megarl.model.family import ModelSpec
from megarl.parallel.mesh import Mesh
from megarl.weights.exchange import Place, unpack
from megarl.weights.names import canonical_parameters
from megarl.weights.plan import (
    Block,
    Held,
    Holders,
    Item,
    Needs,
    items_of,
    make_plan,
    share_of,
    whole,
)
from megarl.weights.rules import CanonTensor
from megarl.weights.transport import transport

# The model's tensors, in streaming order -> the tensors that travel, in order, and who needs what of them (ranks by
# their position in `Mesh.replica_ranks`).
Deal = Callable[[list[Item]], tuple[list[Item], Needs]]


def to_all(items: list[Item]) -> tuple[list[Item], Needs]:
    """Every rank gets every tensor."""
    return items, whole


def tensor_parallel(tensor: CanonTensor, mesh: Mesh) -> tuple[int, int]:
    """(size, rank) of the tensor parallelism that cuts a tensor: experts have their own."""
    return (mesh.tp_size, mesh.tp_rank) if tensor.expert is None else (mesh.etp_size, mesh.etp_rank)


class WeightStream:
    """The model as ``(HF name, tensor)`` pairs, layer by layer; on each rank those that ``deal`` gives it a box of.

    A tensor has its full shape, and what lies outside the box is arbitrary. It may be a view of a
    buffer with other tensors: copy what you keep. Iterating is a collective over the ranks of a model replica
    (``mesh.replica_group``), each of which iterates to the end. What travels, and when, is settled here, once:
    iterating exchanges no names, shapes or sizes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        mesh: Mesh,
        bucket_bytes: int,
        deal: Deal = to_all,
        value: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
        coming: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """
        Args:
            bucket_bytes: no rank's buffers for one exchange take more, unless one tensor alone does.
            deal: which tensors travel, in which order, and what of them each rank gets.
            value: what of a parameter is streamed: its weights, or, to compare layouts, its gradient.
            coming: brings the parameters' memory for the time of an iteration; None where it is always there.
        """
        self.mesh = mesh
        self.parameters = dict(canonical_parameters(model, spec, first_expert(spec, mesh)))
        self.value = value
        self.coming = coming or nullcontext
        tensors = {tensor.name: tensor for tensor in spec.tensors()}
        holders = Holders(tensors.values(), self._held(tensors))
        self.items, needs = deal(items_of(tensors.values(), holders.dtypes))
        size, position = len(mesh.replica_ranks), mesh.replica_ranks.index(mesh.rank)
        self.buckets = make_plan(self.items, holders, needs, size, position, bucket_bytes)
        self.transport = transport(mesh, self.buckets, self._values, self._own, stays=coming is None)

    @property
    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape, dtype) of every tensor of the stream, in its order: static, the same on every rank."""
        return [(item.name, item.shape, item.dtype) for item in self.items]

    def _held(self, tensors: dict[str, CanonTensor]) -> list[dict[str, Held]]:
        """What each rank of the replica holds. The only exchange of names."""
        mine = {}
        for name, parameter in self.parameters.items():
            cut, cuts = share_of(tensors[name], tuple(parameter.shape), *tensor_parallel(tensors[name], self.mesh))
            mine[name] = Held(cut, cuts, self.value(parameter).dtype)
        held: list[dict[str, Held]] = [{} for _ in self.mesh.replica_ranks]
        dist.all_gather_object(held, mine, group=self.mesh.replica_group)
        return held

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.tensors()

    @torch.no_grad()
    def tensors(self, place: Place | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The pairs; with a ``place``, each tensor in the place (of its shape and dtype) that this gives for its
        name."""
        unfinished: dict[str, torch.Tensor] = {}
        with self.coming():
            self.transport.begin()
            on_its_way = self.transport.send(self.buckets[0])
            for k, bucket in enumerate(self.buckets):
                arrived = on_its_way.wait()
                if k + 1 < len(self.buckets):
                    on_its_way = self.transport.send(self.buckets[k + 1])
                yield from unpack(bucket, arrived, self._own, unfinished, place)
                del arrived
            self.transport.end()

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: self.value(parameter) for name, parameter in self.parameters.items()}

    def _own(self, block: Block) -> torch.Tensor:
        return block.of(self.value(self.parameters[block.tensor]))


def first_expert(spec: ModelSpec, mesh: Mesh) -> int:
    """The number of the first expert that this rank holds."""
    return spec.moe.num_experts // mesh.ep_size * mesh.ep_rank if spec.moe else 0
