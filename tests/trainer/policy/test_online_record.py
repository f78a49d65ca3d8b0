from __future__ import annotations

import pytest

from cwpo_trainer.policy.online_record import OnlineRecord
from cwpo_trainer.run.folder import read_lines

# Of an annotator that was as sure of any pair as of another, from 0 to 1.
QUANTILES = [0.0, 0.5, 1.0]


def row(step, confidence, preferred="a", **more):
    return {"step": step, "confidence": confidence, "preferred": preferred, **more}


@pytest.fixture
def record(tmp_path):
    def new(quantiles=QUANTILES, **settings):
        made = OnlineRecord(tmp_path / "pairs.jsonl", quantiles, window=2, limit=0.3, **settings)
        return made

    return new


def test_drift_is_that_of_the_latest_pairs(record):
    kept = record()
    kept.start(after=0)
    assert kept.drift is None
    kept.add(1, [row(1, 0.0), row(1, 1.0)])
    # The quantiles of 0 and 1 are 0, 1/2 and 1.
    assert kept.drift == pytest.approx(0)
    kept.add(2, [row(2, 1.0)])
    # Of 1 and 1: gaps 1, 1/2 and 0, by the trapezoid rule.
    assert kept.drift == pytest.approx(0.5)
    kept.add(3, [])
    assert kept.drift == pytest.approx(0.5)
    kept.add(4, [row(4, 1.0, confidence_as_sampled=0.0)])
    assert kept.drift == pytest.approx(0)


def test_a_resumed_run_goes_on_after_its_checkpoint(record, tmp_path):
    before = record()
    before.start(after=0)
    for step, confidence in enumerate((0.0, 1.0, 0.9), start=1):
        before.add(step, [row(step, confidence), row(step, 0.0, "tie")])
    after = record()
    after.start(after=2)
    assert [one["step"] for one in read_lines(tmp_path / "pairs.jsonl")] == [1, 1, 2, 2]
    assert after.pairs == 2
    assert after.drift == pytest.approx(0)
    after.add(3, [row(3, 0.5)])
    # Of 0 and 1/2: gaps 0, 1/4 and 1/2.
    assert after.drift == pytest.approx(0.25)
    assert after.pairs == 3


def test_a_warning_is_printed_once_until_drift_has_fallen(record, capsys):
    kept = record()
    kept.start(after=0)

    def told(step, *confidences):
        kept.add(step, [row(step, each) for each in confidences])
        return capsys.readouterr().err

    # One pair does not fill the window.
    assert told(1, 1.0) == ""
    assert "step 2: confidence in the last 2 pairs has drifted by 0.500" in told(2, 1.0)
    assert told(3, 1.0) == ""
    assert told(4, 0.0) == ""
    assert "step 5: " in told(5, 0.0)


def test_without_quantiles_there_is_no_drift(record, capsys):
    kept = record(quantiles=None)
    kept.start(after=0)
    assert "drift cannot be measured" in capsys.readouterr().err
    kept.add(1, [row(1, 1.0), row(1, 1.0)])
    assert kept.drift is None
    assert capsys.readouterr().err == ""
