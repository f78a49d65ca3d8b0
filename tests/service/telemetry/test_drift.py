"""The gauge that tells when the data is not what the annotator was made for."""

import numpy as np
import pytest

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend
from cwpo_annotator.checkpoint import read_card, write_card
from cwpo_annotator.scores import Scores
from cwpo_service.telemetry.drift import FEWEST, WINDOW, ConfidenceDrift

GRID = np.linspace(0, 1, 11)


def test_the_distance_of_a_shift_is_its_size():
    drift = ConfidenceDrift()
    drift.expect((GRID / 2).tolist())
    drift.observe((np.linspace(0, 1, 5001) / 2).tolist())
    assert drift.distance() == pytest.approx(0, abs=1e-6)
    drift.expect((GRID / 2).tolist())
    drift.observe((np.linspace(0, 1, 5001) / 2 + 0.25).tolist())
    assert drift.distance() == pytest.approx(0.25)


def test_half_of_the_mass_moved_counts_for_half():
    # R(u) = u; Q(u) = u up to the median, and half as much more after it: by hand 1/16.
    drift = ConfidenceDrift()
    drift.expect(GRID.tolist())
    drift.observe([u if u < 0.5 else 0.5 + (u - 0.5) / 2 for u in np.linspace(0, 1, 9001)])
    assert drift.distance() == pytest.approx(1 / 16, abs=1e-3)


def test_only_what_is_recent_counts():
    drift = ConfidenceDrift()
    drift.expect(GRID.tolist())
    drift.observe([1.0] * WINDOW)
    assert drift.distance() == pytest.approx(0.5)
    for part in np.array_split(np.random.default_rng(0).permutation(np.linspace(0, 1, WINDOW)), 7):
        drift.observe(part.tolist())
    assert drift.distance() == pytest.approx(0, abs=1e-6)
    drift.observe([0.0] * (3 * WINDOW))
    assert drift.distance() == pytest.approx(0.5)


def test_a_few_confidences_and_another_annotator_tell_nothing():
    drift = ConfidenceDrift()
    drift.observe([0.5] * WINDOW)
    assert drift.distance() is None
    drift.expect(GRID.tolist())
    drift.observe([0.5] * (FEWEST - 1))
    assert drift.distance() is None
    drift.observe([0.5])
    assert drift.distance() is not None
    drift.expect(GRID.tolist())
    assert drift.distance() is None


def test_past_its_limit_it_says_what_to_do():
    drift = ConfidenceDrift()
    drift.expect((GRID / 2).tolist())
    assert drift.excess(0.1) is None
    drift.observe((np.linspace(0, 1, 5001) / 2 + 0.25).tolist())
    assert drift.excess(0.3) is None
    told = drift.excess(0.1)
    assert told.startswith("the last 5,001 confidences differ by 0.250 on average")
    assert "--compare-with" in told


class Unsure(NullBackend):
    """An annotator on data that it has no opinion on."""

    def score_pairs(self, pairs):
        return Scores(super().score_pairs(pairs).values / 100)


def gauge(service):
    lines = service.http.get("/metrics").text.splitlines()
    return [float(line.split()[1]) for line in lines if line.startswith("cwpo_confidence_drift ")]


def test_shifted_data_moves_the_gauge(serve, annotator_with, triplet):
    triplets = [triplet(n) for n in range(1000)]
    with serve() as service:
        rows = service.annotate(*triplets).json()["annotations"]
        assert gauge(service) == []
    quantiles = np.quantile([row["confidence"] for row in rows], GRID).tolist()
    distances = []
    for backend in (NullBackend(), Unsure()):
        annotator = annotator_with(backend)
        annotator.confidence_quantiles = quantiles
        with serve(lambda annotator=annotator: annotator) as service:
            service.annotate(*triplets)
            distances += gauge(service)
    same, shifted = distances
    assert same < 0.001
    assert shifted > 0.5


def test_the_quantiles_come_from_the_checkpoint(tiny_annotator, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(tiny_annotator / name)
    card = read_card(tiny_annotator)
    assert Annotator.load(tiny_annotator, device="cpu").confidence_quantiles is None
    quantiles = [n / 100 for n in range(11)]
    write_card(tmp_path, card.model_copy(update={"confidence_quantiles": quantiles}))
    assert Annotator.load(tmp_path, device="cpu").confidence_quantiles == quantiles
