"""Default layers and stored rows: the tables that published drafts were trained with."""

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.target.layers import check_layers, default_layers, default_taps, final_rows

FIVE_TAPS = {
    24: [1, 6, 11, 16, 21],
    28: [1, 7, 13, 19, 25],
    32: [1, 8, 15, 22, 29],
    36: [1, 9, 17, 25, 33],
    40: [1, 10, 19, 28, 37],
    48: [1, 12, 23, 34, 45],
    62: [1, 16, 30, 44, 59],
    64: [1, 16, 31, 46, 61],
    80: [1, 20, 39, 58, 77],
    94: [1, 24, 46, 68, 91],
}


@pytest.mark.parametrize(("depth", "layers"), FIVE_TAPS.items())
def test_five_taps_are_where_published_drafts_have_them(depth, layers):
    assert default_layers(depth, 5) == layers


def test_ties_round_to_even():
    """Half up would give 9 and 24: 1 + 30/4 = 8.5, 1 + 3 * 30/4 = 23.5."""
    assert default_layers(34, 5) == [1, 8, 16, 24, 31]


def test_shallow_targets():
    assert default_layers(8, 3) == [1, 3, 5]
    assert default_layers(8, 1) == [4]
    assert default_layers(6, 5) == [1, 2, 3], "coinciding layers are kept once"
    with pytest.raises(UsageError, match="too few"):
        default_layers(3, 2)


def test_default_taps():
    assert [default_taps(depth) for depth in (4, 8, 12, 36)] == [1, 3, 5, 5]


@pytest.mark.parametrize("layers", [[-1, 0, 6], [6], [0]])
def test_layers_that_can_be_captured(layers):
    check_layers(layers, depth=8)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([], "no layer"),
        ([3, 1], r"write \[1, 3\]"),
        ([1, 1], "increasing"),
        ([7], "`final`"),
        ([1, 9], "8 layers"),
        ([-2, 1], "-1"),
    ],
)
def test_layers_that_cannot(layers, why):
    with pytest.raises(UsageError, match=why):
        check_layers(layers, depth=8)


def test_final_is_kept_beside_every_supervised_row():
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 1], bool)
    assert final_rows(mask).tolist() == [False, True, True, True, True, False, True, True]
    assert final_rows(np.array([True])).tolist() == [True]
    assert final_rows(np.zeros(3, bool)).tolist() == [False] * 3
