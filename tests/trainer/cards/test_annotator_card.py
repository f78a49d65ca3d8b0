"""What the card of an annotator says, read as the Hub reads it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from cwpo_annotator.checkpoint import read_card
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.run.folder import read_record

from ..samples import pairs, write_lines
from .test_policy_card import card_of, row


@pytest.fixture
def trained(tiny_causal, tmp_path, command):
    def train(*more):
        data = write_lines(tmp_path / "pairs.jsonl", pairs(60))
        flags = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "annotator")
        command(TrainAnnotator, *flags, "--max-steps", 2, "--threads", 1, *more)
        return tmp_path / "annotator"

    return train


@pytest.mark.slow
def test_an_annotator(trained):
    folder = trained("--held-out-fraction", 0.4, "--learning-rate", 1e-2, "--margin", 0.1)
    card, noted = card_of(folder), read_card(folder)
    results = read_record(folder).results
    assert {"cwpo", "reward-model", "bt"} <= {*card.data.tags}
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "text-classification",
    )
    assert row(card, "objective") == "`bt`, margin 0.1, label_smoothing 0.0"
    assert row(card, "fingerprint of the labelled pairs") == f"`{noted.data_fingerprint}`"
    assert row(card, "pairs of training") == str(results["pairs"])
    assert row(card, "pairs held out") == str(noted.held_out.pairs)
    assert row(card, "most tokens of prompt and response") == f"{noted.encoding.max_length:,}"
    figures = re.findall(r"[\d.]+", row(card, "accuracy").replace("95 %", ""))
    accuracy, lowest, highest = (float(each) / 100 for each in figures)
    assert accuracy == pytest.approx(noted.held_out.accuracy, abs=5e-4)
    # Wilson's interval holds the shares from which the measured one is 1.96 standard errors off.
    for share in (lowest, highest):
        error = (share * (1 - share) / noted.held_out.pairs) ** 0.5
        assert abs(share - noted.held_out.accuracy) == pytest.approx(1.96 * error, abs=2e-3)
    assert "cwpo serve --annotator" in card.text
    assert "tanh(|s_a - s_b| / 2)" in card.text
    if noted.temperature is None:
        assert "There is no calibration temperature" in card.text
    else:
        assert f"T = {noted.temperature:.4g}" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@pytest.mark.slow
def test_an_implicit_annotator_that_was_not_measured(trained):
    folder = trained("--objective", "dpo", "--beta", 0.3, "--held-out-fraction", 0)
    card = card_of(folder)
    assert row(card, "objective") == "`dpo`, beta 0.3, label_smoothing 0.0"
    assert "in the folder `reference`" in row(card, "what it reads")
    assert "Not measured" in card.text
    assert isinstance(card, ModelCard)
    assert "pipeline_tag" not in card.data.to_dict()
