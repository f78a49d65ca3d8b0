"""Rows and batches: nothing is left out, none is too large, and none much smaller than the rest."""

import random

import pytest

from cwpo_annotator.backends.torch.rows.packing import (
    balanced,
    length_sorted,
    pack_pairs,
    pack_texts,
)
from cwpo_annotator.encoded import EncodedPair

SIZES = random.Random(0).choices(range(1, 300), k=500)


def sums(groups, sizes):
    return [sum(sizes[at] for at in group) for group in groups]


@pytest.mark.parametrize(
    ("sizes", "limit", "multiple_of", "groups"),
    [
        ([], 10, 2, []),
        ([4, 3, 3], 10, 1, [[0, 1, 2]]),
        ([4, 3, 3], 10, 2, [[0], [1, 2]]),
        # One too large for any group has one to itself.
        ([1, 20, 1], 10, 1, [[1], [0, 2]]),
        # 12 in two groups of 10 would do, but no two of these fit into one.
        ([6, 6, 6], 10, 1, [[0], [1], [2]]),
        # Fewer items than cores: as few groups as without.
        ([4, 3, 3], 10, 4, [[0, 1, 2]]),
        ([4, 3, 3, 1], 10, 4, [[0], [1], [2], [3]]),
    ],
)
def test_groups_by_hand(sizes, limit, multiple_of, groups):
    assert balanced(sizes, limit, multiple_of) == groups


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 16])
def test_groups_are_full_and_alike(multiple_of):
    groups = balanced(SIZES, 1024, multiple_of)
    assert sorted(at for group in groups for at in group) == [*range(len(SIZES))]
    assert len(groups) % multiple_of == 0
    totals = sums(groups, SIZES)
    assert max(totals) <= 1024
    assert min(totals) > 0.95 * max(totals)
    assert len(groups) < 1.05 * sum(SIZES) / 1024 + multiple_of


def test_large_items_are_packed_too():
    sizes = [700, 400, 300] * 50
    totals = sums(balanced(sizes, 1024, 2), sizes)
    assert max(totals) <= 1024
    assert len(totals) <= 80


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 16])
def test_batches_are_of_like_lengths_and_cost(multiple_of):
    batches = length_sorted(SIZES, 1024, multiple_of=multiple_of)
    assert sorted(at for batch in batches for at in batch) == [*range(len(SIZES))]
    lengths = [SIZES[at] for batch in batches for at in batch]
    assert lengths == sorted(SIZES, reverse=True)
    areas = [len(batch) * SIZES[batch[0]] for batch in batches]
    assert max(areas) <= 1024
    assert len(batches) <= len(length_sorted(SIZES, 1024)) + multiple_of - 1


@pytest.mark.parametrize(
    ("lengths", "multiple_of", "sizes"),
    [
        ([], 2, []),
        # All six would fit into one batch.
        ([10] * 6, 1, [6]),
        ([10] * 6, 2, [3, 3]),
        # Two a batch would leave six of the cores idle.
        ([10] * 20, 16, [1] * 20),
        # More cores than texts work together.
        ([10] * 6, 8, [6]),
        ([2000, 10, 10], 2, [1, 2]),
    ],
)
def test_batches_by_hand(lengths, multiple_of, sizes):
    assert [len(batch) for batch in length_sorted(lengths, 1024, multiple_of=multiple_of)] == sizes


def test_a_row_says_what_is_where():
    pairs = [
        EncodedPair((1, 2, 3, 4), (1, 2, 5), shared=2),
        EncodedPair((7, 8), (7, 8), shared=2),
    ]
    (row,) = pack_pairs(pairs, 100)
    assert row.ids == [1, 2, 5, 3, 4, 7, 8]
    assert row.positions == [0, 1, 2, 2, 3, 0, 1]
    assert row.texts == [1, 0, 2, 3]
    assert row.last == [2, 4, 6, 6]
    assert [*row.places()] == [[0, 1, 2], [0, 1, 3, 4], [5, 6], [5, 6]]


def test_the_rows_of_swapped_pairs_are_the_same():
    rng = random.Random(1)
    texts = [tuple(rng.choices(range(9), k=rng.randint(2, 40))) for _ in range(40)]
    pairs = [EncodedPair(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    swapped = [EncodedPair(pair.b, pair.a) for pair in pairs]
    assert [row.ids for row in pack_pairs(pairs, 100)] == [
        row.ids for row in pack_pairs(swapped, 100)
    ]


def test_texts_stand_alone():
    (row,) = pack_texts([(1, 2), (3,)], 100)
    assert (row.ids, row.positions) == ([1, 2, 3], [0, 1, 0])
    assert (row.last, row.texts) == ([1, 2], [0, 1])
    assert [*row.places()] == [[0, 1], [2]]
