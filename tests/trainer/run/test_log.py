from __future__ import annotations

import json

import pytest

from cwpo.errors import CwpoError
from cwpo_trainer.run.folder import read_lines
from cwpo_trainer.run.log import TrainingLog


def test_a_log_file_shows_steps_losses_and_the_best_validation(tmp_path, capsys):
    with TrainingLog(tmp_path / "log.jsonl", "annotator") as log:
        log.start(3)
        log.step(step=1, loss=0.7, lr=1e-4, validation_loss_calibrated=0.65)
        log.step(step=2, loss=0.6, lr=1e-4)
        log.step(step=3, loss=0.5, lr=1e-4, validation_loss_calibrated=0.66)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("annotator: 0 of 3 steps")
    assert last.startswith(
        "annotator: 3 of 3 steps, loss 0.5, validation loss 0.66, lowest validation loss 0.65"
    )
    assert [line["step"] for line in read_lines(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_a_resumed_log_goes_on_after_its_step(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    with TrainingLog(path, "annotator", after=2) as log:
        log.start(4)
        log.step(step=3, loss=0.5, lr=1e-4)
    assert [line.get("loss") for line in read_lines(path)] == [None, None, 0.5]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with (
        pytest.raises(CwpoError, match="the loss became nan at step 1: lower --learning-rate"),
        TrainingLog(tmp_path / "log.jsonl", "annotator") as log,
    ):
        log.step(step=1, loss=float("nan"), lr=1e-4)
