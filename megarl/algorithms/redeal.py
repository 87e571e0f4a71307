"""Samples between two models that are divided differently over the same ranks: each has replicas of its own, which
share a step's work. Tokens go to the ranks that compute with them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megarl.data.packing import balance
from megarl.data.records import Sample
from megarl.parallel.collectives import exchange_samples, gather_objects
from megarl.parallel.mesh import Mesh


class Redeal:
    """From the replicas of ``here`` to those of ``there`` and back; of one and the same layout nothing moves. Every
    method is a collective over all ranks."""

    def __init__(self, here: Mesh, there: Mesh, cost: Callable[[int], float]) -> None:
        self.here, self.there, self.cost = here, there, cost

    def give(self, batches: Sequence[list[Sample]]) -> list[list[Sample]]:
        """The same updates, each dealt over the replicas of ``there`` in shares of nearly equal cost: copies, with
        every field that the samples now have."""
        return list(batches) if self.here is self.there else [self._given(batch) for batch in batches]

    def _given(self, batch: list[Sample]) -> list[Sample]:
        mine = [(sample.row, len(sample.tokens)) for sample in batch]
        rows = sorted(row for part in gather_objects(mine, self.here.dp_group) for row in part)
        shares = balance([self.cost(length) for _, length in rows], self.there.dp_size)
        owner = {rows[i][0]: replica for replica, share in enumerate(shares) for i in share}
        return _sent(batch, owner, self.here, self.there)

    def take_back(self, name: str, theirs: Sequence[Sample], mine: Sequence[Sample]) -> None:
        """Give ``mine`` the tensors that ``there`` computed for its copies of the same rows."""
        if self.here is self.there:
            return
        held = gather_objects([sample.row for sample in mine], self.here.dp_group)
        owner = {row: replica for replica, rows in enumerate(held) for row in rows}
        bare = [Sample(s.prompt_id, s.index, [], 0, row=s.row, values=vars(s)[name]) for s in theirs]
        found: dict[int, Tensor | None] = {s.row: s.values for s in _sent(bare, owner, self.there, self.here)}
        for sample in mine:
            setattr(sample, name, found[sample.row])


def _sent(samples: Sequence[Sample], owner: dict[int, int], here: Mesh, there: Mesh) -> list[Sample]:
    """What the replicas of ``there`` get, by row: one rank of each replica of ``here`` sends its samples to all ranks
    of their owner."""
    ranks = range(here.world_size)
    speaks = here.rank == next(rank for rank in ranks if here.dp_rank_of(rank) == here.dp_rank)
    outgoing: list[list[Sample]] = [
        [sample for sample in samples if speaks and owner[sample.row] == there.dp_rank_of(rank)] for rank in ranks
    ]
    received = [sample for sent in exchange_samples(outgoing, here.host_group) for sample in sent]
    return sorted(received, key=lambda sample: sample.row)
