from cwpo.reviews.pairs import ReviewPair
from cwpo.reviews.selection import pool_size, sampled, spread


def pair(id, prompt, confidence=0.05):
    return ReviewPair(id=id, prompt=prompt, response_a="a", response_b="b", confidence=confidence)


def test_few_of_many_alike_are_taken_and_the_others_first():
    alike = [pair(f"cat{at}", f"how do I feed my cat number {at}") for at in range(50)]
    others = [
        pair("tax", "which taxes does a small company pay"),
        pair("tea", "brew green tea without bitterness"),
        pair("sky", "why does evening light turn red"),
    ]
    taken = [each.id for each in spread([*alike, *others], 4)]
    assert {"tax", "tea", "sky"} < set(taken)


def test_the_least_confident_comes_first_and_before_its_like():
    pairs = [pair("x", "one two three", 0.09), pair("y", "one two three", 0.01)]
    assert [each.id for each in spread(pairs, 2)] == ["y", "x"]


def test_a_selection_begins_with_a_smaller_one():
    pairs = [pair(str(at), f"topic {at % 7} of kind {at % 3}", at / 100) for at in range(60)]
    assert spread(pairs, 20)[:5] == spread(pairs, 5)


def test_no_more_than_there_are():
    assert [each.id for each in spread([pair("x", "")], 5)] == ["x"]
    assert spread([], 5) == []


def test_a_sample_is_in_order_and_the_same_each_time():
    pairs = [pair(str(at), "p") for at in range(1000)]
    taken = sampled(iter(pairs), 100)
    assert taken == sampled(iter(pairs), 100)
    numbers = [int(each.id) for each in taken]
    assert numbers == sorted(numbers)
    # From all parts of the data: of a hundred, about ten from each tenth.
    assert all(3 <= sum(n // 100 == tenth for n in numbers) <= 20 for tenth in range(10))


def test_a_large_selection_compares_with_few():
    assert pool_size(500) == 5000
    assert pool_size(1000) == 5000
    assert pool_size(100_000) == 100_000
