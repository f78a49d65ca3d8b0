"""What a job needs, against values worked out by hand and the benchmarks that the model names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwpo.capacity import MEASURED, PEAK_TFLOPS, plan_annotation
from cwpo.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def plan(**options):
    options = {"rows": 1e6, "tokens": 400, "parameters": 358e6, "gpu": "h100", "gpus": 1} | options
    return plan_annotation(**options)


def test_a_job_by_hand():
    """371 TFLOP/s over 2 · 358e6 · 400 operations are 1,295 triplets/s."""
    found = plan(gpu_hour=2.0)
    assert found.per_second == pytest.approx(371e12 / (2 * 358e6 * 400))
    assert found.hours == pytest.approx(1e6 / found.per_second / 3600)
    assert found.cost == pytest.approx(2 * found.hours)
    assert found.cost_per_million == pytest.approx(found.cost)
    assert found.requests == 3907
    assert found.worker_cores == found.service_cores == 1
    assert not found.is_scaled


def test_more_gpus_take_less_time_and_cost_the_same():
    one, eight = plan(gpu_hour=2.0), plan(gpus=8, gpu_hour=2.0)
    assert eight.hours == pytest.approx(one.hours / 8)
    assert eight.cost == pytest.approx(one.cost)


def test_other_gpus_are_scaled_by_their_peaks():
    other = plan(gpu="l4")
    assert other.is_scaled
    ratio = PEAK_TFLOPS["l4"] / PEAK_TFLOPS["h100"]
    assert other.per_second == pytest.approx(plan().per_second * ratio)


def test_smaller_models_use_less_of_the_gpu_and_still_are_faster():
    sizes = [10e6, 106e6, 200e6, 358e6, 7e9]
    rates = [plan(parameters=size).per_second for size in sizes]
    assert rates == sorted(rates, reverse=True)
    # Where launches bind and not products, a model that is smaller still gains nothing.
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0] * sizes[0] < rates[1] * sizes[1] < rates[2] * sizes[2] < rates[3] * sizes[3]


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"'tpu'.*a100.*h100"):
        plan(gpu="tpu")


def test_the_rates_are_those_of_the_benchmarks():
    shapes = json.loads((RESULTS / "h100" / "utilisation.json").read_text())["results"]
    reached = [shape["gflops"]["linear"] / 1e3 for shape in shapes]
    assert [rate for _, rate in MEASURED.h100_tflops] == pytest.approx(reached, rel=0.01)
    # The tokens of a pair that these rates were measured with follow from the operations of one.
    for shape, (parameters, rate) in zip(shapes, MEASURED.h100_tflops, strict=True):
        tokens = rate * 1e12 / (2 * parameters * shape["pairs_per_second"])
        found = plan(parameters=parameters, tokens=tokens).per_second
        assert found == pytest.approx(shape["pairs_per_second"], rel=0.01)
        assert 200 < tokens < 230
    seconds = json.loads((RESULTS / "jobs.json").read_text())["runs"]
    of_row = [
        (run["cpu_seconds"]["worker"] / run["rows"], run["cpu_seconds"]["service"] / run["rows"])
        for run in seconds
        if run["workers"] <= 2
    ]
    for worker, service in of_row:
        assert worker == pytest.approx(MEASURED.worker_seconds, rel=0.15)
        assert service == pytest.approx(MEASURED.service_seconds, rel=0.15)
    ledger = json.loads((RESULTS / "ledger.json").read_text())
    assert ledger["redis_mib"] * 2**20 == pytest.approx(MEASURED.redis_bytes, rel=0.15)
