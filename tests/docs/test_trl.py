"""The code of docs/trl.md runs, and does what the page says."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

import cwpo_trainer

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE.read_text())


@pytest.fixture(scope="module")
def trainers(tiny_causal, tmp_path_factory):
    """The trainer of each block, after the blocks have run one after the other on a CPU."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "runs").mkdir()
    (folder / "runs" / "sft").symlink_to(tiny_causal)
    rows: list[dict[str, object]] = [
        {"prompt": f"number {i}", "chosen": " good", "rejected": " bad", "confidence": i / 8}
        for i in range(8)
    ]
    Dataset.from_list(rows).to_parquet(folder / "weighted.parquet")
    names: dict[str, object] = {}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        more = {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no"}
        config = partial(cwpo_trainer.ConfidenceDPOConfig, **more)
        patch.setattr(cwpo_trainer, "ConfidenceDPOConfig", config, raising=False)
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
            found.append(names["trainer"])
    return found


def test_every_block_trains(trainers):
    assert len(trainers) == len(BLOCKS) == 2
    assert all(trainer.state.global_step > 0 for trainer in trainers)


def test_rows_are_packed(trainers):
    assert [trainer.unpacked_because for trainer in trainers] == [None, None]


def test_weights_are_the_confidences_or_one(trainers):
    weighted, unweighted = (trainer.state.log_history[0] for trainer in trainers)
    assert weighted["loss"] < weighted["unweighted_loss"]
    assert unweighted["weight"] == 1
    assert unweighted["loss"] == pytest.approx(unweighted["unweighted_loss"], abs=1e-4)


def test_what_the_page_names_is_logged(trainers):
    section = PAGE.read_text().partition("## What is logged")[2]
    named, missing = section.split("TRL's\n`logits")
    logged = set(trainers[0].state.log_history[0])
    names = {name for name in re.findall(r"`([a-z_/]+)`", named) if not name.endswith("/")}
    assert names - {"rewards/*", "logps/*"} <= logged
    assert not set(re.findall(r"`([a-z_/]+)`", "`logits" + missing)) & logged
