from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from transformers import TrainingArguments

from cwpo.datasets.weighted import weighted_writer
from cwpo.types import ModelRef
from cwpo_annotator.checkpoint import revisions
from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, weighted, write_lines

SMALL = (
    *("--batch-size", 8, "--gradient-accumulation", 1, "--epochs", 1, "--dtype", "float32"),
    *("--learning-rate", 1e-9, "--threads", 1),
)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def flags(tiny_causal, tmp_path, output):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(32))
    return ("--model", tiny_causal, "--data", data, "--output", output, *SMALL)


@pytest.mark.parametrize("more", [(), ("--lora",), ("--lora", "--precompute-reference")])
def test_evaluation_in_training_keeps_the_weights(more, flags, output, command):
    command(Align, *flags, *more, "--eval-fraction", 0.3, "--eval-steps", 1, "--max-steps", 2)
    results = read_record(output).results
    assert results["pairs"] + results["eval_pairs"] == 32
    assert 0 < results["eval_pairs"] < 32
    assert results["eval_mean_weight"] != pytest.approx(results["mean_weight"], rel=1e-3)
    # The policy stays where it is, so that every pair's loss stays log 2.
    assert results["eval_loss"] == pytest.approx(
        results["eval_mean_weight"] * math.log(2), rel=1e-4
    )
    steps, evaluations = [], []
    for line in read_lines(output / "training.jsonl"):
        (evaluations if "eval_loss" in line else steps).append(line)
    assert [line["step"] for line in evaluations] == [1, 2]
    for line in steps:
        assert line["loss"] == pytest.approx(line["weight"] * math.log(2), rel=1e-4)


def test_a_weight_that_selects_pairs_holds_out_what_sft_does(flags, output, tmp_path, command):
    """A dialogue is held out by its first prompt, whether that is selected or not."""
    rows = weighted(32)
    for at in range(0, 32, 2):
        start = f"\n\nHuman: {at}\n\nAssistant:"
        rows[at] |= {"prompt": start, "confidence": 0.1 + at / 1000}
        rows[at + 1] |= {"prompt": f"{start} a\n\nHuman: b\n\nAssistant:", "confidence": 0.9}
    write_lines(tmp_path / "weighted.jsonl", rows)
    flags = (*flags, "--eval-fraction", 0.4, "--max-steps", 1)
    command(Sft, *flags)
    held_out = read_record(output).results["eval_pairs"]
    top = ("--weight", "top", "--top-percent", 50, "--output", tmp_path / "top")
    command(Align, *flags, *top)
    results = read_record(tmp_path / "top").results
    assert (results["eval_pairs"], results["pairs"]) == (held_out / 2, 16 - held_out / 2)


def test_a_weight_may_select_none_of_those_held_out(flags, tmp_path, failure):
    message = failure(Align, *flags, "--eval-fraction", 0.3, "--weight", "top", "--top-percent", 3)
    assert "raise --top-percent, or give more to --eval-data" in message


def test_sft_evaluates_on_a_file_of_its_own(flags, output, tmp_path, command):
    other = write_lines(tmp_path / "other.jsonl", weighted(8, seed=5))
    command(Sft, *flags, "--eval-data", other)
    results = read_record(output).results
    assert (results["pairs"], results["eval_pairs"]) == (32, 8)
    assert 0 < results["eval_loss"] < 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--load-in-4bit",), "add --lora"),
        (("--load-in-4bit", "--lora"), "pip install bitsandbytes"),
        (("--load-in-4bit", "--lora", "--sharding", "fsdp2"), "leave --sharding out"),
        (("--optimizer", "paged_adamw_32bit"), "needs a CUDA GPU"),
        (("--sharding", "fsdp2"), "torchrun --nproc-per-node"),
        (("--sharding", "zero3"), "torchrun --nproc-per-node"),
        (("--sharding", "fsdp2", "--optimizer", "paged_adamw_32bit"), "cannot update"),
        (("--sharding", "fsdp2", "--lora", "--precompute-reference"), "leave the flag out"),
        (("--report-to", "wandb"), "pip install wandb"),
        (("--eval-steps", 2), "nothing to evaluate on"),
        (("--eval-data", "x.jsonl", "--eval-fraction", 0.1), "give one of them"),
        (("--push-to-hub", "name"), "looks like owner/name"),
        (("--push-to-hub", "owner/name"), "hf auth login"),
        (("--annotator", "0123456789ab"), "does not say which annotator"),
        (("--loss", "simpo", "--precompute-reference"), "simpo has no reference"),
        (("--epsilon", 0.5), "--epsilon"),
        (("--world-size", 3), "1 processes train"),
    ],
)
def test_what_cannot_be_had_is_refused_at_once(more, message, flags, failure, monkeypatch):
    if torch.cuda.is_available() and "CUDA" in message:
        pytest.skip("there is a GPU")
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    unreadable = (*flags[:3], "unread.jsonl", *flags[4:])
    assert message in failure(Align, *unreadable, *more)


def test_an_output_that_exists_is_refused_before_data_is_read(flags, output, failure):
    output.mkdir()
    unreadable = (*flags[:3], "unread.jsonl", *flags[4:])
    for kind in (Align, Sft):
        assert "exists already" in failure(kind, *unreadable)


def test_a_plain_run_uses_one_of_several_gpus_and_says_so(tmp_path, capsys):
    config = TrainingArguments(tmp_path, per_device_train_batch_size=3, use_cpu=True)
    process.use_one_gpu(config)
    assert capsys.readouterr().err == ""
    # As transformers finds them without torchrun.
    config._n_gpu = 4
    assert config.train_batch_size == 12
    process.use_one_gpu(config)
    assert config.train_batch_size == 3
    assert "1 of 4 GPUs is used: `torchrun --nproc-per-node 4" in capsys.readouterr().err


def written_by(path, annotator):
    with path.open("wb") as sink, weighted_writer(sink, "parquet", annotator) as writer:
        writer.write(weighted(8))
    return path


def test_a_dataset_of_another_annotator_is_refused(
    tiny_annotator, tiny_causal, tmp_path, output, command, failure
):
    current, former = revisions(tiny_annotator)
    right = ModelRef(name="annotator", revision=current)
    earlier = ModelRef(name="annotator", revision=former)
    wrong = ModelRef(name="older", revision="0123456789ab")
    for name, by in (("right", right), ("earlier", earlier), ("wrong", wrong)):
        data = written_by(tmp_path / f"{name}.parquet", by)
        flags = ("--model", tiny_causal, "--data", data, "--output", output, *SMALL)
        flags = (*flags, "--annotator", tiny_annotator, "--max-steps", 1)
        if by is not wrong:
            command(Sft, *flags, "--output", tmp_path / f"by-{name}")
        else:
            message = failure(Align, *flags, "--output", tmp_path / "other")
            assert f"older at revision 0123456789ab, not by {tiny_annotator}" in message


@pytest.fixture
def no_weights(tiny_causal, tmp_path):
    """A model of which there is only what data is read with."""
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny_causal, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": math.nan}, "row 2: confidence is not a number: nan"),
        ({"confidence": None}, "row 2: confidence is missing"),
        ({"chosen": " "}, "row 2: response_a is empty; 1 of 4 rows"),
    ],
)
def test_a_bad_row_is_named(change, message, flags, no_weights, tmp_path, failure):
    rows = weighted(4)
    rows[1] |= change
    write_lines(tmp_path / "weighted.jsonl", rows)
    assert message in failure(Align, *flags, "--model", no_weights)


def test_one_confidence_for_all_is_refused(flags, no_weights, tmp_path, command, failure):
    rows = [row | {"confidence": 0.5} for row in weighted(4)]
    write_lines(tmp_path / "weighted.jsonl", rows)
    message = failure(Align, *flags, "--model", no_weights)
    assert "all 4 pairs have the same confidence, 0.5" in message
    command(Align, *flags, "--weight", "none", "--max-steps", 1)


@pytest.mark.parametrize("kind", [Sft, Align])
def test_a_tokenizer_without_an_end_is_refused(kind, flags, tiny_causal, tmp_path, failure):
    folder = tmp_path / "endless"
    folder.mkdir()
    for path in tiny_causal.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "no EOS" in failure(kind, *flags, "--model", folder)


def test_human_labels_have_no_annotator(flags, tmp_path, failure):
    labelled = write_lines(tmp_path / "labelled.jsonl", pairs(8))
    message = failure(
        Align, *flags, "--data", labelled, "--labels", "human", "--annotator", "0123456789ab"
    )
    assert "no annotator wrote human labels" in message
