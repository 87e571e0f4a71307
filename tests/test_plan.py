"""The exchange of weights without processes: every rank's part of the plan, carried out in one loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.model.family import EMBEDDING, ModelSpec
from megarl.weights.exchange import Arrived, pack, packed_bytes, room, unpack
from megarl.weights.plan import Box, Held, Holders, Item, items_of, make_plan, share_of
from megarl.weights.rules import CanonTensor
from megarl.weights.shard import local_shape, segments
from megarl.weights.transport import Unpacking
from tests.test_rules import specs


@dataclass(frozen=True)
class Layout:
    """One replica: ``pp`` stages of max(tp, ep x etp) ranks."""

    tp: int
    ep: int
    etp: int
    layers: tuple[int, ...]  # of each pipeline stage
    whole_down: bool  # whether MLA's down projections are whole, as with Transformer Engine's layers

    @property
    def width(self) -> int:
        return max(self.tp, self.ep * self.etp)

    @property
    def size(self) -> int:
        return self.width * len(self.layers)

    def holds(self, spec: ModelSpec, tensor: CanonTensor, rank: int) -> tuple[int, int] | None:
        """(cut, cuts) of what a rank holds of a tensor."""
        stage, j = divmod(rank, self.width)
        last = stage == len(self.layers) - 1
        parts = tensor.name.split(".")
        if parts[0] == "decoder" and parts[1] == "layers":
            first = sum(self.layers[:stage])
            here = first <= int(parts[2]) < first + self.layers[stage]
        elif tensor.name == EMBEDDING:
            here = stage == 0 or (spec.tied and last)
        else:
            here = last
        if tensor.expert is not None:
            each = spec.moe.num_experts // self.ep
            here = here and tensor.expert // each == j // self.etp % self.ep
            size, at = self.etp, j % self.etp
        else:
            size, at = self.tp, j % self.tp
        if not here:
            return None
        cuts = 1 if self.whole_down and tensor.shard.value == "down" else size
        return share_of(tensor, local_shape(tensor, cuts if tensor.shard.value != "replicated" else 1), size, at)


def random_hf(spec: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Random bits in every HF tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in spec.tensors():
        shapes |= tensor.hf_shapes()
    return {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
        for name, shape in shapes.items()
    }


def parameters_of(spec: ModelSpec, layout: Layout, hf: dict[str, torch.Tensor], rank: int):
    """What a rank holds: its parameters, and what it says of them."""
    parameters, held = {}, {}
    for tensor in spec.tensors():
        share = layout.holds(spec, tensor, rank)
        if share is None:
            continue
        cut, cuts = share
        local = torch.zeros(local_shape(tensor, cuts), dtype=torch.int16)
        for part in segments(tensor, cuts, cut):
            local[part.local_rows] = part.view(hf[part.hf])
        parameters[tensor.name] = local
        held[tensor.name] = Held(cut, cuts, torch.int16)
    return parameters, held


def exchange(spec, layout, hf, needs, bucket_bytes, items=None, lasting=True):
    """What every rank gets: name -> tensor, and the largest buffers of any rank and bucket."""
    ranks = range(layout.size)
    parameters, held = zip(*(parameters_of(spec, layout, hf, rank) for rank in ranks), strict=True)
    holders = Holders(spec.tensors(), held)
    items = items or items_of(spec.tensors(), holders.dtypes)
    plans = [make_plan(items, holders, needs, layout.size, rank, bucket_bytes) for rank in ranks]
    assert len({len(plan) for plan in plans}) == 1
    got: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    unfinished: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    largest = 0
    for step in zip(*plans, strict=True):
        own = [lambda block, mine=mine: block.of(mine[block.tensor]) for mine in parameters]
        buffers = [torch.empty(packed_bytes(bucket, layout.size), dtype=torch.uint8) for bucket in step]
        sizes = [pack(bucket, layout.size, own[r], buffers[r]) for r, bucket in enumerate(step)]
        assert len({bucket.travels for bucket in step}) == 1
        assert step[0].travels == any(len(buffer) for buffer in buffers)
        for rank, bucket in enumerate(step):
            pieces = [buffer.split(cuts)[rank] for buffer, cuts in zip(buffers, sizes, strict=True)]
            assert [len(piece) for piece in pieces] == room(bucket, layout.size)
            largest = max(largest, sum(map(len, pieces)) + len(buffers[rank]))
            arrived = Arrived(Unpacking(pieces), lasting=lasting)
            for name, tensor in unpack(bucket, arrived, own[rank], unfinished[rank]):
                assert name not in got[rank]
                got[rank][name] = tensor
        if not lasting:
            for buffer in buffers:
                buffer.fill_(0xAB)
    assert not any(unfinished)
    return got, largest


def delivered(spec, layout, needs, rank, items) -> dict[str, torch.Tensor]:
    """How many times each element of each tensor reaches a rank."""
    held = [
        {t.name: Held(*share, torch.int16) for t in spec.tensors() if (share := layout.holds(spec, t, r)) is not None}
        for r in range(layout.size)
    ]
    holders = Holders(spec.tensors(), held)
    counts = {item.name: torch.zeros(item.shape, dtype=torch.int16) for item in items}
    for bucket in make_plan(items, holders, needs, layout.size, rank, 1 << 12):
        for _, block in bucket.arrivals:
            block.hf.view(counts[block.item.name]).add_(1)
    return counts


def wanted(items: list[Item], needs, rank) -> dict[str, torch.Tensor]:
    """1 where a rank needs an element, 0 elsewhere."""
    masks = {item.name: torch.zeros(item.shape, dtype=torch.int16) for item in items}
    for item in items:
        for part in item.parts:
            box = needs(rank, part, item.name)
            if box is None:
                continue
            for run in {(r.index, r.transposed) for r in part.runs if r.hf == item.source}:
                matrix = masks[item.name] if run[0] is None else masks[item.name][run[0]]
                matrix = matrix.T if run[1] else matrix
                rows = matrix[box.top : box.bottom]
                (rows if rows.dim() == 1 else rows[:, box.left : box.right]).fill_(1)
    return masks


@st.composite
def cases(draw):
    spec = draw(specs()).without_mtp()
    fits = [n for n in (1, 2, 4) if _divides(spec, n, 1)]
    tp = draw(st.sampled_from(fits))
    ep, etp = 1, tp
    if spec.moe:
        ep = draw(st.sampled_from([n for n in (1, 2, 4) if spec.moe.num_experts % n == 0]))
        etp = draw(st.sampled_from([n for n in (1, 2, 4) if _divides(spec, 1, n)]))
        if max(tp, ep * etp) % min(tp, ep * etp):
            etp = 1
    layers, stages = spec.num_layers, []
    while layers:
        stages.append(draw(st.integers(1, layers)))
        layers -= stages[-1]
    layout = Layout(tp, ep, etp, tuple(stages), draw(st.booleans()))
    return spec, layout, draw(st.integers(0, 2**31)), draw(st.sampled_from([4_000, 20_000, 10**9]))


def _divides(spec: ModelSpec, tp: int, etp: int) -> bool:
    try:
        for tensor in spec.tensors():
            local_shape(tensor, tp if tensor.expert is None else etp)
    except ValueError:
        return False
    return True


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_every_rank_gets_what_it_needs_bit_for_bit_and_once(case, random):
    spec, layout, seed, bucket_bytes = case
    hf = random_hf(spec, seed)
    everything, largest = exchange(spec, layout, hf, lambda *_: Box(), bucket_bytes)
    # Blocks are padded to 16 bytes; a row may be larger than a bucket, and goes to every other rank.
    row = max(item.shape[-1] for item in items_of(spec.tensors(), _int16(spec))) * 2
    assert largest <= bucket_bytes + layout.size * (row + 16) * 16
    for got in everything:
        assert got.keys() == hf.keys()
        assert all(torch.equal(got[name], hf[name]) for name in hf)

    boxes = {}

    def needs(rank, tensor, name):
        if (rank, name) not in boxes:
            kinds = [Box(), None, Box(1, 7), Box(left=2, right=5), Box(3, None, 1, None)]
            boxes[rank, name] = random.choice(kinds)
        return boxes[rank, name]

    items = items_of(spec.tensors(), _int16(spec))
    some, _ = exchange(spec, layout, hf, needs, bucket_bytes, lasting=False)  # what arrives is overwritten afterwards
    for rank in range(layout.size):
        masks, counts = wanted(items, needs, rank), delivered(spec, layout, needs, rank, items)
        for item in items:
            assert torch.equal(counts[item.name], masks[item.name]), item.name
            if masks[item.name].any():
                inside = masks[item.name] == 1
                assert torch.equal(some[rank][item.name][inside], hf[item.name][inside]), item.name


def _int16(spec: ModelSpec) -> dict[str, torch.dtype]:
    return dict.fromkeys((tensor.name for tensor in spec.tensors()), torch.int16)
