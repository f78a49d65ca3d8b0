"""Online rounds against a real service."""

from __future__ import annotations

import os
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cwpo.exit_codes import ExitCode
from cwpo_annotator.confidence import drift
from cwpo_trainer.commands import Online
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, write_lines

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture
def flags(url, tiny_causal, tmp_path):
    align = tmp_path / "align.yaml"
    align.write_text(
        f"max_steps: {STEPS}\nbatch_size: 2\ngradient_accumulation: 1\nlearning_rate: 1.0e-2\n"
        "dtype: float32\nthreads: 1\nmodel: not-this-one\n"
    )
    return (
        *("--url", url, "--model", tiny_causal, "--align", align, "--threads", 1),
        *("--prompts", write_lines(tmp_path / "prompts.jsonl", pairs(6))),
        *("--prompts-per-round", 4, "--max-new-tokens", 6),
    )


def terminate_in_training(log, was_sent):
    """SIGTERM to this process once the log shows a step."""
    while not read_lines(log):
        time.sleep(0.001)
    was_sent.set()
    os.kill(os.getpid(), signal.SIGTERM)


def test_rounds_that_were_stopped_end_as_ones_that_were_not(
    flags, tmp_path, command, failure, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command(Online, *flags, "--output", whole, "--rounds", 2)
    printed = capsys.readouterr()
    assert f"the policy of the last round: {whole / 'round-2' / 'policy'}" in printed.out
    assert "round 2: confidence has drifted by" in printed.err

    log, was_sent = stopped / "round-1" / ".policy.partial" / "training.jsonl", threading.Event()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        threading.Thread(target=terminate_in_training, args=(log, was_sent), daemon=True).start()
        with pytest.raises(SystemExit) as exit_:
            command(Online, *flags, "--output", stopped, "--rounds", 2)
        assert was_sent.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_.value.code == ExitCode.STOPPED
    assert not (stopped / "rounds.jsonl").exists()
    again = (*flags, "--output", stopped)
    assert "continue with --resume" in failure(Online, *again)
    assert "top_p was 1.0" in failure(Online, *again, "--resume", "--top-p", 0.5)
    command(Online, *again, "--resume", "--rounds", 1)
    command(Online, *again, "--resume", "--rounds", 2)

    lines = read_lines(whole / "rounds.jsonl")
    assert [line["round"] for line in lines] == [1, 2]
    assert read_lines(stopped / "rounds.jsonl") == lines
    for line in lines:
        assert line["pairs"] + line["without_a_pair"] + line["rejected"] == line["prompts"] == 4
        # All quantiles being 0, the distance is near the mean.
        assert line["drift"] == pytest.approx(line["mean_confidence"], abs=0.2)
        assert line["drift"] > 0
        assert line["steps"] == STEPS
    left, right = (
        load_file(x / "round-2" / "policy" / "model.safetensors") for x in (whole, stopped)
    )
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    # Each round starts from the policy before it, with the first one as reference.
    settings = read_record(whole / "round-2" / "policy").settings
    assert settings["model"] == str(whole / "round-1" / "policy")
    assert settings["reference"] == str(flags[3])
    answers = [read_lines(whole / f"round-{n}" / "triplets.jsonl") for n in (1, 2)]
    assert {row["prompt"] for row in answers[0]} != {row["prompt"] for row in answers[1]}


def test_rounds_train_one_adapter_further(flags, tiny_causal, tmp_path, command):
    with (tmp_path / "align.yaml").open("a") as file:
        file.write("lora: true\nlora_rank: 2\nadapter_only: true\n")
    output = tmp_path / "out"
    command(Online, *flags, "--output", output, "--rounds", 2)
    first, second = (output / f"round-{number}" / "policy" for number in (1, 2))
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert left.keys() == right.keys()
    assert not any(torch.equal(left[name], right[name]) for name in left)
    assert read_record(second).settings["model"] == str(first)
    assert not (second / "model.safetensors").exists()
    # The reference is the first model, from which the policy has moved away.
    margins = [line["rewards/margins"] for line in read_lines(second / "training.jsonl")]
    assert abs(margins[0]) > 1e-4


def test_of_more_answers_the_best_and_the_worst_are_compared(flags, tmp_path, command):
    output = tmp_path / "out"
    command(Online, *flags, "--output", output, "--rounds", 1, "--responses", 5)
    table = pq.read_table(output / "round-1" / "weighted.parquet")
    assert set(table["preferred"].to_pylist()) == {"a"}
    # Drift is measured on the first two answers, which were not chosen for their scores.
    chosen, sampled = (table[name].to_numpy() for name in ("confidence", "confidence_as_sampled"))
    assert (sampled <= chosen + 1e-6).all()
    assert sampled.mean() < chosen.mean()
    (line,) = read_lines(output / "rounds.jsonl")
    assert line["drift"] == pytest.approx(drift(sampled, [0.0] * 11))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("lerning_rate: 1", "no setting is called lerning_rate"),
        ("labels: human", "labels: human is not for online rounds"),
        ("loss: simpo", "simpo has no reference; say --reference round"),
        ("epsilon: 0.5", "--epsilon"),
        ("tau: 0.1", "--tau belongs to --loss ipo; dpo takes --beta"),
    ],
)
def test_a_bad_align_file_is_refused_first(line, reason, flags, tmp_path, failure):
    (tmp_path / "align.yaml").write_text(line + "\n")
    assert reason in failure(Online, *flags, "--output", tmp_path / "out", "--model", "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_prompt_is_named(flags, tmp_path, failure):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"question": "why"}])
    message = failure(Online, *flags, "--output", tmp_path / "out")
    assert "row 2: prompt is missing" in message


def test_the_environment_of_align_says_nothing_of_rounds(flags, tmp_path, failure, monkeypatch):
    monkeypatch.setenv("CWPO_LABELS", "human")
    message = failure(Online, *flags, "--output", tmp_path / "out", "--model", "nowhere")
    assert "nowhere" in message
