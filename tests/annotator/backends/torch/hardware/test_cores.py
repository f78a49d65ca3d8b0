"""Passes run side by side, each on one core, and give what they give one after the other."""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.hardware.cores import Cores
from cwpo_annotator.encoding.encoder import Encoder

TRIPLETS = [
    Triplet(prompt="why " * (2 + i), response_a="because good " * i, response_b="no " * (9 - i))
    for i in range(1, 9)
]


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cores():
    cores = Cores(3)
    yield cores
    cores.close()


def where_each_is_done(cores, items, size=lambda item: 1):
    all_begun = threading.Barrier(min(cores.count, len(items)))

    def work(item):
        if len(items) == cores.count:
            all_begun.wait(timeout=120)
        return item, (threading.current_thread(), torch.get_num_threads())

    found = cores.each(work, items, size)
    assert [item for item, _ in found] == [*items]
    return [place for _, place in found]


def test_each_core_computes_with_one_thread_and_all_at_once(cores):
    places = where_each_is_done(cores, range(3))
    assert {threads for _, threads in places} == {1}
    assert len({thread for thread, _ in places}) == 3
    assert len(where_each_is_done(cores, range(20))) == 20


def test_fewer_items_than_cores_are_done_by_all_together(cores):
    assert where_each_is_done(cores, range(2)) == [(threading.current_thread(), 3)] * 2


@pytest.mark.parametrize(
    ("sizes", "threads"),
    [
        # Two cores would wait while the third did the last one.
        ([8, 9, 6, 7], [1, 1, 3, 1]),
        ([5, 1, 5, 5, 5, 5, 1, 5], [1, 3, 1, 1, 1, 1, 3, 1]),
        # One core is busy anyway for as long as the others take for the rest.
        ([3, 6, 3, 3, 3], [1, 1, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        ([9, 1], [3, 3]),
    ],
)
def test_what_would_leave_cores_idle_is_done_by_all_together(cores, sizes, threads):
    items = range(len(sizes))
    places = where_each_is_done(cores, items, sizes.__getitem__)
    assert [used for _, used in places] == threads


def test_threads_to_come_compute_with_all_cores(cores):
    seen = []
    later = threading.Thread(
        target=lambda: seen.append((torch.zeros(1 << 20).exp_(), torch.get_num_threads())[1])
    )
    later.start()
    later.join()
    assert seen == [3]


def test_an_error_reaches_the_caller(cores):
    def fail(item):
        raise RuntimeError(f"item {item}")

    with pytest.raises(RuntimeError, match="item 0"):
        cores.each(fail, range(5), lambda item: 1)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 20])
def test_scores_are_the_same_on_any_number_of_cores(folder, threads):
    alone = Annotator.load(folder, threads=1, token_budget=60)
    together = Annotator.load(folder, threads=threads, token_budget=60)
    expected = [(label.score_a, label.score_b) for label in alone.annotate(TRIPLETS)]
    found = [(label.score_a, label.score_b) for label in together.annotate(TRIPLETS)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for annotator in (alone, together):
        annotator.backend.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_has_no_scores(folder, threads):
    backend = Annotator.load(folder, threads=threads).backend
    assert backend.score_pairs([]).values.shape == (0, 2)
    assert backend.score_texts([]).values.shape == (0,)
    backend.close()


@pytest.mark.parametrize(("rope", "cores"), [("default", 2), ("dynamic", 1)])
def test_a_model_that_remembers_the_longest_text_reads_one_row_at_a_time(
    tiny_annotator, tmp_path, rope, cores
):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_annotator)
    model.config.rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    model.save_pretrained(tmp_path)
    Encoder.load(tiny_annotator).save(tmp_path)
    assert Annotator.load(tmp_path, threads=2).backend._cores.count == cores


@pytest.mark.parametrize("threads", [1, 3])
def test_every_core_has_something_to_do_in_a_batch(folder, threads):
    backend = Annotator.load(folder, threads=threads).backend
    assert backend.batch_tokens == 2048 * threads
    backend.close()
