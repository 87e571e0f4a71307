"""The exchange of weights without processes: every rank's part of the plan, carried out in one loop."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.model.family import EMBEDDING, ModelSpec
from megarl.weights.boxed import Boxed
from megarl.weights.checksums import checksum, sum_of_segment
from megarl.weights.exchange import Arrived, pack, packed_bytes, room, unpack
from megarl.weights.plan import Box, Held, Holders, Item, boxes_of, items_of, make_plan, share_of
from megarl.weights.rules import CanonTensor, Shard
from megarl.weights.shard import local_shape, segments
from megarl.weights.transport import Unpacking
from tests.test_rules import MODELS, specs


@dataclass(frozen=True)
class Layout:
    """One replica: ``pp`` stages of max(tp, ep x etp) ranks. Layers are dealt in chunks to the stages in turn, more
    than once around where the pipeline is interleaved."""

    tp: int
    ep: int
    etp: int
    pp: int
    chunks: tuple[int, ...]  # layers of each chunk, in the model's order

    @property
    def width(self) -> int:
        return max(self.tp, self.ep * self.etp)

    @property
    def size(self) -> int:
        return self.width * self.pp

    def stage_of(self, layer: int) -> int:
        ends = itertools.accumulate(self.chunks)
        return next(k for k, end in enumerate(ends) if layer < end) % self.pp

    def holds(self, spec: ModelSpec, tensor: CanonTensor, rank: int) -> tuple[int, int] | None:
        """(cut, cuts) of what a rank holds of a tensor."""
        stage, j = divmod(rank, self.width)
        last = stage == self.pp - 1
        parts = tensor.name.split(".")
        if parts[0] == "decoder" and parts[1] == "layers":
            here = stage == self.stage_of(int(parts[2]))
        elif tensor.name == EMBEDDING:
            here = stage == 0 or (last and (spec.tied or spec.mtp_num_layers > 0))
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
        return share_of(tensor, local_shape(tensor, 1 if tensor.shard is Shard.REPLICATED else size), size, at)


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
        parameters[tensor.name] = local_of(tensor, hf, *share)
        held[tensor.name] = Held(*share, torch.int16)
    return parameters, held


def local_of(tensor: CanonTensor, hf: dict[str, torch.Tensor], cut: int, cuts: int) -> torch.Tensor:
    """One of ``cuts`` shares of a megatron tensor."""
    local = torch.zeros(local_shape(tensor, cuts), dtype=torch.int16)
    for part in segments(tensor, cuts, cut):
        local[part.local_rows] = part.view(hf[part.hf])
    return local


def exchange(spec, layout, hf, needs, bucket_bytes, items, lasting=True):
    """What every rank gets, name -> tensor; how often each element of it reaches the rank; and the largest buffers of
    any rank and bucket."""
    ranks = range(layout.size)
    parameters, held = zip(*(parameters_of(spec, layout, hf, rank) for rank in ranks), strict=True)
    holders = Holders(spec.tensors(), held)
    plans = [make_plan(items, holders, needs, layout.size, rank, bucket_bytes) for rank in ranks]
    boxes = [boxes_of(items, needs, rank) for rank in ranks]
    assert len({len(plan) for plan in plans}) == 1
    got: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    unfinished: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    counts = [{item.name: torch.zeros(item.shape, dtype=torch.int16) for item in items} for _ in ranks]
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
            for _, block in bucket.arrivals:
                block.hf.view(counts[rank][block.item.name]).add_(1)
            arrived = Arrived(Unpacking(pieces), lasting=lasting)
            for name, tensor in unpack(bucket, arrived, own[rank], unfinished[rank], boxes[rank]):
                assert name not in got[rank]
                got[rank][name] = tensor
        if not lasting:
            for buffer in buffers:
                buffer.fill_(0xAB)
    assert not any(unfinished)
    return got, counts, largest


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
def cases(draw, family):
    spec = draw(specs(family, most_layers=4))
    if draw(st.booleans()):
        spec = spec.without_mtp()
    tp = draw(st.sampled_from([n for n in (1, 2, 4) if _divides(spec, n, 1)]))
    ep, etp = 1, tp
    if spec.moe:
        ep = draw(st.sampled_from([n for n in (1, 2, 4) if spec.moe.num_experts % n == 0]))
        etp = draw(st.sampled_from([n for n in (1, 2) if _divides(spec, 1, n)]))
    pp = draw(st.integers(1, min(3, spec.num_layers)))
    vpp = draw(st.integers(1, spec.num_layers // pp))
    # Any number of layers a chunk, at least one: cuts between layers, in order.
    between = st.lists(st.integers(1, spec.num_layers - 1), min_size=pp * vpp - 1, max_size=pp * vpp - 1, unique=True)
    cuts = [0, *(sorted(draw(between)) if pp * vpp > 1 else []), spec.num_layers]
    layout = Layout(tp, ep, etp, pp, tuple(b - a for a, b in itertools.pairwise(cuts)))
    return spec, layout, draw(st.integers(0, 2**31)), draw(st.sampled_from([4_000, 20_000, 10**9]))


def _divides(spec: ModelSpec, tp: int, etp: int) -> bool:
    try:
        for tensor in spec.tensors():
            local_shape(tensor, tp if tensor.expert is None else etp)
    except ValueError:
        return False
    return True


EXPERTS = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe")  # many tensors: a second a case


@pytest.mark.parametrize(
    "family, examples",
    [(family, 2 if family in EXPERTS else 8) for family in sorted(MODELS)]
    + [pytest.param(family, 25, marks=pytest.mark.slow) for family in sorted(MODELS)],
)
def test_every_rank_gets_what_it_needs_bit_for_bit_and_once(family, examples):
    check = given(cases(family), st.randoms(use_true_random=False))(check_exchange)
    settings(max_examples=examples, deadline=None)(check)()


def check_exchange(case, random):
    spec, layout, seed, bucket_bytes = case
    hf = random_hf(spec, seed)
    items = items_of(spec.tensors(), _int16(spec))
    everything, _, largest = exchange(spec, layout, hf, lambda *_: Box(), bucket_bytes, items)
    # Blocks are padded to 16 bytes; a row may be larger than a bucket, and goes to every other rank.
    row = max(item.shape[-1] for item in items) * 2
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

    # What arrives is overwritten afterwards.
    some, counts, _ = exchange(spec, layout, hf, needs, bucket_bytes, items, lasting=False)
    for rank in range(layout.size):
        masks, there = wanted(items, needs, rank), boxes_of(items, needs, rank)
        for item in items:
            assert torch.equal(counts[rank][item.name], masks[item.name]), item.name
            if not masks[item.name].any():
                assert item.name not in some[rank]
            elif item.name in there:  # the rank has memory for its box, and for nothing else
                box, got = there[item.name], some[rank][item.name]
                inside = hf[item.name][box.top : box.bottom]
                inside = inside[:, box.left : box.right] if inside.dim() == 2 else inside
                assert isinstance(got, Boxed) and got.shape == item.shape and torch.equal(got.box, inside), item.name
                assert checksum(got) == sum_of(item, layout, spec, hf, box), item.name
            else:
                inside = masks[item.name] == 1
                assert torch.equal(some[rank][item.name][inside], hf[item.name][inside]), item.name


def sum_of(item, layout, spec, hf, box) -> int:
    """What the ranks' own sums of their segments add up to."""
    (part,) = item.parts
    total, seen = 0, set()
    for rank in range(layout.size):
        share = layout.holds(spec, part, rank)
        if share is None or share in seen:
            continue
        seen.add(share)
        local = local_of(part, hf, *share)
        here = [segment for segment in segments(part, share[1], share[0]) if segment.hf == item.name]
        total += sum(int(sum_of_segment(local, segment, item.shape, box)) for segment in here)
    return (total + 2**63) % 2**64 - 2**63


def _int16(spec: ModelSpec) -> dict[str, torch.dtype]:
    return dict.fromkeys((tensor.name for tensor in spec.tensors()), torch.int16)
