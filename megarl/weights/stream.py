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
from megarl.weights.checksums import sum_of_segment
from megarl.weights.exchange import Place, unpack
from megarl.weights.names import canonical_parameters
from megarl.weights.plan import (
    Block,
    Box,
    Held,
    Holders,
    Item,
    Needs,
    boxes_of,
    items_of,
    make_plan,
    share_of,
    whole,
)
from megarl.weights.rules import CanonTensor
from megarl.weights.shard import segments
from megarl.weights.transport import transport

# The model's tensors, in streaming order, and who holds what -> the tensors that travel, in order, and who needs what
# of them (ranks by their position in `Mesh.replica_ranks`).
Deal = Callable[[list[Item], Holders], tuple[list[Item], Needs]]


def to_all(items: list[Item], holders: Holders) -> tuple[list[Item], Needs]:
    """Every rank gets every tensor."""
    return items, whole


def tensor_parallel(tensor: CanonTensor, mesh: Mesh) -> tuple[int, int]:
    """(size, rank) of the tensor parallelism that cuts a tensor: experts have their own."""
    return (mesh.tp_size, mesh.tp_rank) if tensor.expert is None else (mesh.etp_size, mesh.etp_rank)


class WeightStream:
    """The model as ``(HF name, tensor)`` pairs, layer by layer; on each rank those that ``deal`` gives it a box of.

    A tensor has its full shape; where the box is not all of it, it is a `Boxed`, which has nothing outside. It may be a
    view of a buffer with other tensors: copy what you keep. Iterating is a collective over the ranks of a model replica
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
        shares = self._held(tensors)
        self._holders = Holders(tensors.values(), shares)
        self.items, self._needs = deal(items_of(tensors.values(), self._holders.dtypes), self._holders)
        size, self._position = len(mesh.replica_ranks), mesh.replica_ranks.index(mesh.rank)
        self._shares = shares[self._position]
        self.buckets = make_plan(self.items, self._holders, self._needs, size, self._position, bucket_bytes)
        self._boxes = boxes_of(self.items, self._needs, self._position)
        self.transport = transport(mesh, self.buckets, self._values, self._own, stays=coming is None)

    @property
    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape, dtype) of every tensor of the stream, in its order: static, the same on every rank."""
        return [(item.name, item.shape, item.dtype) for item in self.items]

    @property
    def receivers(self) -> list[list[int]]:
        """Of every tensor of the stream, in its order: the ranks of this model replica that get something of it."""
        ranks = self.mesh.replica_ranks
        return [
            [rank for at, rank in enumerate(ranks) if self._needs(at, item.parts[0], item.name) is not None]
            for item in self.items
        ]

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
                yield from unpack(bucket, arrived, self._own, unfinished, self._boxes, place)
                del arrived
            self.transport.end()

    @torch.no_grad()
    def sums(self) -> dict[str, int]:
        """The checksum of every tensor that this rank gets, of its box: out of the parameters, by the rules, whatever
        the exchange does. A collective over the ranks of a model replica."""
        size = len(self.mesh.replica_ranks)
        sums = torch.zeros(size, len(self.items), dtype=torch.int64, device=self.mesh.device)
        with self.coming():
            for column, item in enumerate(self.items):
                for part in item.parts:
                    boxes = [self._needs(position, part, item.name) for position in range(size)]
                    found = {box: self._counted(item, part, box) for box in set(boxes) if box is not None}
                    for position, box in enumerate(boxes):
                        sums[position, column] += found.get(box, 0)
        dist.all_reduce(sums, group=self.mesh.replica_group)
        mine = sums[self._position].tolist()
        return {item.name: total for item, total in zip(self.items, mine, strict=True) if self._gets(item)}

    def _counted(self, item: Item, part: CanonTensor, box: Box) -> int | torch.Tensor:
        """What this rank adds to the sum of a box; nothing where a rank before it holds the same."""
        share = self._shares.get(part.name)
        if share is None or self._holders.first(part.name, share.cut) != self._position:
            return 0
        parameter = self.value(self.parameters[part.name])
        here = [segment for segment in segments(part, share.cuts, share.cut) if segment.hf == item.source]
        return sum(sum_of_segment(parameter, segment, item.shape, box) for segment in here)

    def _gets(self, item: Item) -> bool:
        return any(self._needs(self._position, part, item.name) is not None for part in item.parts)

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: self.value(parameter) for name, parameter in self.parameters.items()}

    def _own(self, block: Block) -> torch.Tensor:
        return block.of(self.value(self.parameters[block.tensor]))


def first_expert(spec: ModelSpec, mesh: Mesh) -> int:
    """The number of the first expert that this rank holds."""
    return spec.moe.num_experts // mesh.ep_size * mesh.ep_rank if spec.moe else 0
