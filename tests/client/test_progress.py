"""Progress where there is no terminal: plain lines, by a clock that the tests turn."""

import io

import pytest

from cwpo.progress import Progress, duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def show(clock):
    """`show(work, steps, ...)`: the lines; a step is (seconds that pass, arguments of update)."""

    def lines(work, steps, **options):
        stream = io.StringIO()
        with Progress(work, stream=stream, clock=clock, **options) as progress:
            for seconds, update in steps:
                clock.now += seconds
                progress.update(**update)
        return stream.getvalue().splitlines()

    return lines


def test_a_line_comes_at_first_then_every_thirty_seconds_and_at_the_end(show):
    steps = [(1, {"done": 10 * n}) for n in range(1, 101)]
    assert show("annotate", steps, unit="rows", total=1000) == [
        "annotate: 10 of 1,000 rows, 10 rows/s, 1 min 39 s left",
        "annotate: 310 of 1,000 rows, 10 rows/s, 1 min 9 s left",
        "annotate: 610 of 1,000 rows, 10 rows/s, 39 s left",
        "annotate: 910 of 1,000 rows, 10 rows/s, 9 s left",
        "annotate: 1,000 of 1,000 rows, 10 rows/s",
    ]


def test_the_rate_is_that_of_late_and_in_the_end_that_of_the_whole(show):
    steps = [(10, {"done": 100}), (30, {"done": 160}), (10, {"done": 600})]
    assert show("annotate", steps, unit="rows", total=600) == [
        "annotate: 100 of 600 rows, 10 rows/s, 50 s left",
        "annotate: 160 of 600 rows, 2 rows/s, 3 min 40 s left",
        "annotate: 600 of 600 rows, 12 rows/s",
    ]


def test_steps_tell_their_loss_and_a_resumed_run_only_what_it_does_itself(show):
    steps = [(8, {"done": 121, "loss": 0.693147}), (32, {"done": 125, "loss": 0.5})]
    assert show("align", steps, unit="steps", total=560, done=120) == [
        "align: 121 of 560 steps, loss 0.6931, 0.12 steps/s, 58 min 32 s left",
        "align: 125 of 560 steps, loss 0.5, 0.12 steps/s, 58 min 0 s left",
    ]


def test_a_total_may_be_unknown_at_first_and_the_work_change(show):
    steps = [
        (1, {"work": "validating"}),
        (30, {"work": "running", "total": 9, "done": 3}),
        (1, {"work": "completed", "done": 9}),
    ]
    assert show("submitted", steps, unit="rows") == [
        "validating: 0 rows",
        "running: 3 of 9 rows, 0.1 rows/s, 1 min 0 s left",
        "completed: 9 of 9 rows, 0.28 rows/s",
    ]


def test_work_that_was_never_told_of_prints_nothing_and_the_last_line_is_not_repeated(show):
    assert show("annotate", [], unit="rows", total=3) == []
    assert show("annotate", [(1, {"done": 30})], unit="rows", total=30) == [
        "annotate: 30 of 30 rows, 30 rows/s"
    ]


def test_work_that_breaks_off_says_how_far_it_came(clock):
    stream = io.StringIO()

    def broken():
        with Progress("annotate", unit="rows", total=30, stream=stream, clock=clock) as progress:
            for _ in range(2):
                clock.now += 1
                progress.advance(10)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert stream.getvalue().splitlines()[-1] == "annotate: 20 of 30 rows, 10 rows/s, 1 s left"


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("annotate", unit="rows", total=30, stream=stream) as progress:
        progress.advance(30, loss=0.25)
    assert "30/30" in stream.getvalue()
    assert "rows loss 0.25" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (7500, "2 h 5 min")]
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words
