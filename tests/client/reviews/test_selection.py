import numpy as np

from cwpo.reviews.pairs import ReviewPair
from cwpo.reviews.selection import pool_size, sampled, spread


def pair(id, confidence=0.05):
    return ReviewPair(id=id, prompt="p", response_a="a", response_b="b", confidence=confidence)


def taken(pairs, embeddings, most):
    return [each.id for each in spread(pairs, embeddings, most)]


def test_few_of_many_alike_are_taken_and_the_others_first():
    draw = np.random.default_rng(0)
    alike = [np.array([1, 0, 0, 0]) + draw.normal(0, 0.01, 4) for _ in range(50)]
    others = np.eye(4)[1:]
    pairs = [pair(f"cat{at}") for at in range(50)] + [pair(id) for id in ("tax", "tea", "sky")]
    found = taken(pairs, [*alike, *others], 4)
    assert {"tax", "tea", "sky"} < set(found)


def test_the_order_is_that_of_angles_from_the_mean_worked_by_hand():
    # The mean is 0. From x: y has cosine 0, z has -1, w has 0. Then z; y and w are alike from both,
    # and w is the less confident.
    embeddings = [[2, 0], [0, 1], [-2, 0], [0, -1]]
    pairs = [pair("x", 0.01), pair("y", 0.04), pair("z", 0.03), pair("w", 0.02)]
    assert taken(pairs, embeddings, 4) == ["x", "z", "w", "y"]
    # Where all lie is of no account.
    assert taken(pairs, [[100 + x, y - 50] for x, y in embeddings], 4) == ["x", "z", "w", "y"]


def test_the_least_confident_comes_first_and_before_its_like():
    pairs = [pair("x", 0.09), pair("y", 0.01), pair("z", 0.02)]
    assert taken(pairs, [[1, 0], [1, 0], [0, 1]], 3) == ["y", "z", "x"]


def test_a_selection_begins_with_a_smaller_one():
    draw = np.random.default_rng(1)
    pairs = [pair(str(at), at / 100) for at in range(60)]
    embeddings = draw.normal(size=(60, 5))
    assert taken(pairs, embeddings, 20)[:5] == taken(pairs, embeddings, 5)


def test_those_without_an_embedding_come_last_by_confidence():
    pairs = [pair("x", 0.01), pair("y", 0.03), pair("z", 0.02)]
    assert taken(pairs, [None, [1, 0], None], 3) == ["y", "x", "z"]
    assert taken(pairs, [None, None, None], 2) == ["x", "z"]


def test_no_more_than_there_are():
    assert taken([pair("x")], [[1.0]], 5) == ["x"]
    assert spread([], [], 5) == []


def test_a_sample_is_in_order_and_the_same_each_time():
    pairs = [pair(str(at)) for at in range(1000)]
    found = sampled(iter(pairs), 100)
    assert found == sampled(iter(pairs), 100)
    numbers = [int(each.id) for each in found]
    assert numbers == sorted(numbers)
    # From all parts of the data: of a hundred, about ten from each tenth.
    assert all(3 <= sum(n // 100 == tenth for n in numbers) <= 20 for tenth in range(10))


def test_a_large_selection_compares_with_few():
    assert pool_size(50) == 500
    assert pool_size(500) == 2000
    assert pool_size(100_000) == 100_000
