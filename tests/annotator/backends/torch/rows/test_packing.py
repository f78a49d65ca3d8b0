"""Rows and batches: nothing is left out, none is too large, and none much smaller than the rest."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


BEGINNING = tuple(range(100, 120))


def text_at(row, places):
    return tuple(row.ids[place] for place in places)


def test_a_row_says_what_is_where():
    pairs = [
        EncodedPair((*BEGINNING, 3, 4), (*BEGINNING, 1)),
        EncodedPair((*BEGINNING, 3, 4), (*BEGINNING, 5)),
        EncodedPair((7, 8), (7, 8)),
    ]
    (row,) = pack_pairs(pairs, 100)
    assert row.ids == [*BEGINNING, 1, 3, 4, 5, 7, 8]
    assert row.positions == [*range(20), 20, 20, 21, 20, 0, 1]
    # The first text of two pairs, and both of the last, are read once.
    assert dict(zip(row.texts, row.last, strict=True)) == {1: 20, 0: 22, 2: 22, 3: 23, 4: 25, 5: 25}
    begin = [*range(20)]
    places = [[*begin, 20], [*begin, 21, 22], [*begin, 21, 22], [*begin, 23], [24, 25], [24, 25]]
    assert [*row.places()] == places


def test_a_text_that_continues_another_has_only_its_own_tokens():
    longest = (*BEGINNING, *range(30))
    (row,) = pack_texts([longest, BEGINNING, (*BEGINNING, *range(18), 70)], 100)
    assert row.ids == [*longest, 70]
    assert dict(zip(row.texts, row.last, strict=True)) == {0: 49, 1: 19, 2: 50}


def test_few_tokens_are_not_worth_sharing():
    (row,) = pack_texts([(1, 2, 3), (1, 2, 4)], 100)
    assert len(row.ids) == 6


def test_a_row_is_cut_where_the_fewest_tokens_are_read_twice():
    system = tuple(range(20))
    prompts = [(*system, *[number] * 60) for number in (100, 200, 300)]
    texts = [(*prompt, response) for prompt in prompts for response in (1, 2, 3)]
    rows = [*pack_texts(texts, 150)]
    # 83 tokens for each prompt with its responses; of two prompts the beginning would be read once.
    assert [len(row.ids) for row in rows] == [146, 83]


texts_of_a_tree = st.lists(
    st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4), min_size=1, max_size=40
).map(lambda texts: [tuple(digit for digit in text for _ in range(10)) for text in texts])


@given(texts_of_a_tree, st.sampled_from([30, 100, 1000]), st.sampled_from([1, 2]))
def test_every_text_is_read_whole_and_once(texts, budget, multiple_of):
    rows = [*pack_texts(texts, budget, multiple_of=multiple_of)]
    found = {}
    for row in rows:
        assert len(row.ids) <= budget or len(row.runs) == 1
        assert len(row.runs) == len({text_at(row, places) for places in row.places()})
        for number, last, places in zip(row.texts, row.last, row.places(), strict=True):
            found[number] = text_at(row, places)
            assert last == places[-1]
            assert [row.positions[place] for place in places] == [*range(len(places))]
    assert [found[number] for number in range(len(texts))] == texts
    assert sum(len(row.runs) for row in rows) == len(set(texts))
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    if len(rows) == 1:
        # All but beginnings of ten tokens, which are too short, are read once.
        assert len(rows[0].ids) <= len(beginnings) + 10 * len(texts)


@given(texts_of_a_tree, st.sampled_from([30, 100]))
def test_both_texts_of_a_pair_are_in_one_row(texts, budget):
    pairs = [EncodedPair(a, b) for a, b in zip(texts, reversed(texts), strict=True)]
    seen = []
    for row in pack_pairs(pairs, budget):
        for number, places in zip(row.texts, row.places(), strict=True):
            pair = pairs[number // 2]
            assert text_at(row, places) == (pair.b if number % 2 else pair.a)
        numbers = sorted(row.texts)
        assert [number ^ 1 for number in numbers[::2]] == numbers[1::2]
        seen += numbers
    assert sorted(seen) == [*range(2 * len(pairs))]


def test_rows_do_not_depend_on_the_order_of_texts():
    rng = random.Random(1)
    texts = [tuple(rng.choices(range(2), k=rng.randint(2, 40))) for _ in range(80)]
    pairs = [EncodedPair(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    swapped = [EncodedPair(pair.b, pair.a) for pair in pairs]
    assert [row.ids for row in pack_pairs(pairs, 100)] == [
        row.ids for row in pack_pairs(swapped, 100)
    ]
    shuffled = rng.sample(texts, len(texts))
    assert [row.ids for row in pack_texts(texts, 100)] == [
        row.ids for row in pack_texts(shuffled, 100)
    ]


def test_texts_stand_alone():
    (row,) = pack_texts([(1, 2), (3,)], 100)
    assert (row.ids, row.positions) == ([1, 2, 3], [0, 1, 0])
    assert (row.last, row.texts) == ([1, 2], [0, 1])
    assert [*row.places()] == [[0, 1], [2]]
    assert [*pack_texts([], 100)] == []
