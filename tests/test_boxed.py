"""Tensors of which only a box is there, and the sums that compare both sides of a push."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.weights.boxed import Boxed, SyncError
from megarl.weights.checksums import Checked, checksum

WHOLE = torch.arange(48.0).view(8, 6)


def rows_2_to_5() -> Boxed:
    return Boxed("up_proj.weight", (8, 6), WHOLE[2:5].clone(), (2, 0))


def test_a_view_inside_the_box_is_a_plain_tensor():
    boxed = rows_2_to_5()
    assert (boxed.shape, boxed.dtype, boxed.dim()) == ((8, 6), torch.float32, 2)
    views = [boxed.narrow(0, 2, 3), boxed[2:5], boxed.data[2:5, :], boxed.unsqueeze(0).unbind()[0].narrow(0, 2, 3)]
    for view in views:
        assert type(view) is torch.Tensor and torch.equal(view, WHOLE[2:5])
    assert torch.equal(boxed[3:5, 1:4], WHOLE[3:5, 1:4]) and torch.equal(boxed[3], WHOLE[3])
    assert boxed.narrow(0, 7, 0).shape == (0, 6)  # nothing, from anywhere
    columns = Boxed("down_proj.weight", (8, 6), WHOLE[:, 3:].clone(), (0, 3))
    assert torch.equal(columns.narrow(1, 3, 3), WHOLE[:, 3:])
    assert torch.equal(columns[1:3].narrow(1, 4, 2), WHOLE[1:3, 4:])


@pytest.mark.parametrize("start, there", [(0, "2:3"), (1, "2:4"), (3, "3:5"), (5, "5:5")])
def test_a_part_that_is_not_there_is_refused_by_name(start, there):
    said = rf"reads \[{start}:{start + 3}, 0:6\] of it, of which only \[{there}, 0:6\]"
    with pytest.raises(SyncError, match="up_proj.weight: aten.copy_.default " + said):
        torch.zeros(3, 6).copy_(rows_2_to_5().narrow(0, start, 3))


def test_all_of_it_is_refused_too():
    for read in (torch.clone, torch.t, lambda x: x + 1, lambda x: x[::2], lambda x: x[0], lambda x: x.to("meta")):
        with pytest.raises(SyncError, match=r"up_proj.weight: .* of which only \[2:5, 0:6\] was sent to this rank"):
            read(rows_2_to_5())


def test_a_sum_weighs_each_element_by_its_place():
    """1 x 1 + 2 x 3 + 3 x 5 + 4 x 7; of the second row alone 3 x 5 + 4 x 7."""
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    assert checksum(tensor) == 50
    assert checksum(Boxed("w", (2, 2), tensor[1:], (1, 0))) == 43
    assert checksum(Boxed("w", (2, 2), tensor[:, 1:], (0, 1))) == 2 * 3 + 4 * 7


@given(st.data(), st.sampled_from([torch.int64, torch.float32, torch.bfloat16, torch.int8]))
def test_boxes_add_up_and_a_flipped_bit_shows(data, dtype):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    bits = torch.randint(0, 255, (rows, columns * dtype.itemsize), dtype=torch.uint8).view(dtype)
    row, column = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    quarters = [
        Boxed("w", bits.shape, bits[a:b, c:d], (a, c))
        for a, b in ((0, row), (row, rows))
        for c, d in ((0, column), (column, columns))
    ]
    assert (sum(map(checksum, quarters)) - checksum(bits)) % 2**64 == 0
    changed = bits.clone()
    which = data.draw(st.integers(0, changed.nbytes - 1))
    changed.view(-1).view(torch.uint8)[which] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(changed) != checksum(bits)


def test_what_comes_changed_uninvited_or_not_at_all_is_named():
    tensors = {name: torch.arange(4) for name in "abc"}
    expected = {name: checksum(tensor) for name, tensor in tensors.items()} | {"d": 0}
    arriving = Checked([("a", tensors["a"]), ("b", tensors["b"].flip(0)), ("e", tensors["a"])], expected)
    assert [name for name, _ in arriving] == ["a", "b", "e"]
    assert arriving.wrong == ["b", "e", "c", "d"]
