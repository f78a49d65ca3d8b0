from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from cwpo_trainer.commands import Align, Sft, TrainAnnotator
from cwpo_trainer.data.weighted import read_weighted
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.run.folder import read_lines, read_record

from .samples import pairs, weighted, write_lines


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "weighted.jsonl", weighted(32))


SMALL = (
    *("--batch-size", 4, "--gradient-accumulation", 1, "--learning-rate", 1e-2, "--epochs", 1),
    *("--dtype", "float32"),
)


def parameters(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora",)])
def test_sft_then_align(lora, tiny_causal, data, tmp_path, command):
    sft, aligned = tmp_path / "sft", tmp_path / "aligned"
    command(Sft, "--model", tiny_causal, "--data", data, "--output", sft, *SMALL, *lora)
    command(Align, "--model", sft, "--data", data, "--output", aligned, *SMALL, *lora)
    start, tuned, final = map(parameters, (tiny_causal, sft, aligned))
    assert start.keys() == tuned.keys() == final.keys()
    assert any(not torch.equal(start[name], tuned[name]) for name in start)
    assert any(not torch.equal(tuned[name], final[name]) for name in start)
    log = read_lines(aligned / "training.jsonl")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert log[0]["unweighted_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1]["rewards/margins"] > 0
    assert read_record(aligned).results["pairs"] == 32
    assert (aligned / "adapter").exists() == bool(lora)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_sft_learns_the_responses(tiny_causal, data, tmp_path, command):
    flags = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "sft")
    command(Sft, *flags, *SMALL, "--epochs", 6)
    log = read_lines(tmp_path / "sft" / "training.jsonl")
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]


@pytest.mark.slow
def test_sft_does_not_learn_the_prompts(tiny_causal, tmp_path, command):
    # Prompts and responses have no token but the template's in common.
    rows = [row | {"prompt": f"JQXZ {row['id']}"} for row in weighted(16)]
    source = write_lines(tmp_path / "weighted.jsonl", rows)
    flags = ("--model", tiny_causal, "--data", source, "--output", tmp_path / "sft")
    command(Sft, *flags, *SMALL, "--max-steps", 2, "--batch-size", 16, "--weight-decay", 0)
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny_causal))
    learnt = formatter.tokenise([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    wanted = torch.tensor([sum(len(text.response_ids) for text in learnt)])
    log = read_lines(tmp_path / "sft" / "training.jsonl")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_causal).eval()
        total = torch.zeros(1)
        for text in learnt:
            ids = torch.tensor([text.prompt_ids + text.response_ids])
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            of_token = scores.gather(1, ids[0, 1:, None])[:, 0]
            total -= of_token[len(text.prompt_ids) - 1 :].sum()
    assert log[0]["loss"] == pytest.approx((total / wanted).item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "rdpo", "hinge", "cdpo", "simpo", "orpo"])
def test_the_other_losses(loss, tiny_causal, data, tmp_path, command):
    command(
        Align,
        *("--model", tiny_causal, "--data", data, "--output", tmp_path / loss, *SMALL),
        *("--loss", loss, "--normalise"),
    )
    assert read_record(tmp_path / loss).results["mean_weight"] == pytest.approx(1)
    assert read_lines(tmp_path / loss / "training.jsonl")[-1]["rewards/margins"] > 0


@pytest.mark.slow
def test_weight_none_is_unweighted(tiny_causal, data, tmp_path, command):
    command(
        Align,
        *("--model", tiny_causal, "--data", data, "--output", tmp_path / "dpo", *SMALL),
        *("--weight", "none"),
    )
    lines = read_lines(tmp_path / "dpo" / "training.jsonl")
    assert lines
    for line in lines:
        assert line["loss"] == pytest.approx(line["unweighted_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight", ["margin", "normalised_margin", "power", "entropy", "rank", "confidence"]
)
def test_the_weights_reach_the_loss(weight, tiny_causal, data, tmp_path, command):
    command(
        Align,
        *("--model", tiny_causal, "--data", data, "--output", tmp_path / "out", *SMALL),
        *("--weight", weight, "--batch-size", 32),
        *(("--exponent", 2) if weight == "power" else ()),
    )
    confidences = np.array([pair.confidence for pair in read_weighted(data)])
    by_hand = {
        "confidence": confidences,
        "power": confidences**2,
        "margin": np.log((1 + confidences) / (1 - confidences)),
        "rank": (confidences.argsort().argsort() + 1) / 32,
    }
    (line,) = read_lines(tmp_path / "out" / "training.jsonl")
    # At the start every pair's loss is log 2.
    assert line["loss"] == pytest.approx(line["weight"] * math.log(2), rel=1e-3)
    if weight in by_hand:
        assert line["weight"] == pytest.approx(by_hand[weight].mean(), rel=1e-4)


def test_the_pairs_of_a_prompt_count_as_one_unless_a_flag_says_otherwise(
    tiny_causal, tmp_path, command, capsys
):
    rows = [row | {"prompt_pairs": 1 + at % 4} for at, row in enumerate(weighted(32))]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    confidences = np.array([row["confidence"] for row in rows])
    counts = np.array([row["prompt_pairs"] for row in rows])
    wanted = {"prompt": (confidences / counts).mean(), "pair": confidences.mean()}
    flags = ("--model", tiny_causal, "--data", data, *SMALL, "--batch-size", 32)
    for by, flag in (("prompt", ()), ("pair", ("--weight-by", "pair"))):
        command(Align, *flags, *flag, "--output", tmp_path / by)
        results = read_record(tmp_path / by).results
        assert results["weight_by"] == by
        assert results["mean_weight"] == pytest.approx(wanted[by], rel=1e-4)
        (line,) = read_lines(tmp_path / by / "training.jsonl")
        # At the start every pair's loss is log 2.
        assert line["loss"] == pytest.approx(wanted[by] * math.log(2), rel=1e-3)
        said = capsys.readouterr().err
        assert ("weight confidence / prompt_pairs" in said) == (by == "prompt")


def test_a_dataset_of_triplets_is_not_weighted_by_prompt(tiny_causal, data, tmp_path, command):
    flags = ("--model", tiny_causal, "--data", data, *SMALL, "--max-steps", 1)
    command(Align, *flags, "--output", tmp_path / "out")
    assert "weight_by" not in read_record(tmp_path / "out").results


def test_top_leaves_the_other_pairs_out(tiny_causal, data, tmp_path, command):
    flags = ("--model", tiny_causal, "--data", data, *SMALL)
    command(Align, *flags, "--weight", "top", "--top-percent", 25, "--output", tmp_path / "out")
    results = read_record(tmp_path / "out").results
    assert (results["pairs"], results["mean_weight"]) == (8, 1)


@pytest.mark.slow
def test_a_constant_factor_of_the_weights_is_told_by_clipping_alone(
    tiny_causal, data, tmp_path, command
):
    def trained(weight, norm):
        output = tmp_path / f"{weight}-{norm}"
        files = ("--model", tiny_causal, "--data", data, "--output", output, *SMALL)
        command(Align, *files, "--weight", weight, "--max-grad-norm", norm, "--max-steps", 4)
        return parameters(output)

    def apart(left, right):
        # The mean: a gradient as small as AdamW's epsilon feels the scale of its loss.
        return torch.cat([(left[name] - right[name]).flatten() for name in left]).abs().mean()

    unclipped = apart(trained("margin", 0), trained("normalised_margin", 0))
    # Some of the four gradients are above this, and others below; which ones, the scale decides.
    norms = [line["grad_norm"] for line in read_lines(tmp_path / "margin-0" / "training.jsonl")]
    limit = sorted(norms)[1]
    clipped = apart(trained("margin", limit), trained("normalised_margin", limit))
    assert clipped > 20 * unclipped, (clipped, unclipped)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TrainAnnotator, Sft])
def test_gradients_are_clipped_at_the_norm_of_the_flag(kind, tiny_causal, tmp_path, command):
    rows = pairs(24) if kind is TrainAnnotator else weighted(24)
    source = write_lines(tmp_path / "rows.jsonl", rows)
    files = ("--model", tiny_causal, "--data", source, "--weight-decay", 0, "--threads", 1)
    start, moved = AutoModel.from_pretrained(tiny_causal).state_dict(), []
    # Below AdamW's epsilon, a gradient moves nothing.
    for norm in (0, 1e-14):
        output = tmp_path / f"{norm}"
        command(kind, *files, "--output", output, *SMALL[4:], "--max-grad-norm", norm)
        ended = AutoModel.from_pretrained(output).state_dict()
        moved.append(max((ended[name] - start[name]).abs().max().item() for name in start))
    assert moved[0] > 1e-3
    assert moved[1] < 1e-6


@pytest.mark.slow
def test_human_labels_are_the_baseline(tiny_causal, tmp_path, failure, command):
    source = write_lines(tmp_path / "labelled.jsonl", pairs(8))
    flags = ("--model", tiny_causal, "--data", source, *SMALL, "--labels", "human")
    command(Sft, *flags, "--output", tmp_path / "sft")
    command(Align, *flags, "--output", tmp_path / "dpo")
    results = read_record(tmp_path / "dpo").results
    assert (results["pairs"], results["mean_weight"]) == (8, 1)
    message = failure(Align, *flags, "--weight", "rank", "--output", tmp_path / "no")
    assert "--labels human" in message


def test_long_pairs_are_left_out_and_counted(tiny_causal, tmp_path, command, capsys):
    rows = weighted(8)
    rows[2]["chosen"] = "the day " * 60
    source = write_lines(tmp_path / "weighted.jsonl", rows)
    command(
        Align,
        *("--model", tiny_causal, "--data", source, "--output", tmp_path / "out", *SMALL),
        *("--max-length", 64, "--max-steps", 1),
    )
    said = capsys.readouterr().err
    assert "1 of 8 pairs left out: 1 too_long. Keep them with a larger `--max-l" in said
    results = read_record(tmp_path / "out").results
    assert (results["pairs"], results["pairs_too_long"]) == (7, 1)


@pytest.mark.slow
def test_settings_come_from_a_file_and_flags_win(tiny_causal, data, tmp_path, command):
    config = tmp_path / "align.yaml"
    config.write_text(
        f"model: {tiny_causal}\ndata: {data}\nbeta: 0.25\nloss: rdpo\nmax_steps: 1\nbatch-size: 2\n"
    )
    command(Align, "--config", config, "--output", tmp_path / "out", "--loss", "ipo")
    settings = read_record(tmp_path / "out").settings
    assert (settings["beta"], settings["loss"], settings["batch_size"]) == (0.25, "ipo", 2)


@pytest.mark.parametrize("kind", [Sft, Align])
def test_a_misspelt_setting_is_refused(kind, tiny_causal, data, tmp_path, failure):
    config = tmp_path / "align.yaml"
    config.write_text(f"model: {tiny_causal}\ndata: {data}\nbetta: 0.25\n")
    message = failure(kind, "--config", config, "--output", tmp_path / "out")
    assert "no setting is called betta" in message


@pytest.mark.parametrize("kind", [Sft, Align, TrainAnnotator])
def test_an_unknown_model_is_one_line(kind, data, tmp_path, failure):
    source = data
    if kind is TrainAnnotator:
        source = write_lines(tmp_path / "pairs.jsonl", pairs(30))
    flags = ("--model", tmp_path / "nowhere", "--data", source, "--output", tmp_path / "out")
    assert "nowhere: no such folder" in failure(kind, *flags)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_one_line(tiny_causal, data, tmp_path, failure):
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_causal / name).read_bytes())
    flags = ("--model", folder, "--data", data, "--output", tmp_path / "out")
    assert "not a causal language model" in failure(Align, *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "weighted.jsonl"]


def test_a_dataset_without_confidence_is_refused_before_anything(tiny_causal, tmp_path, failure):
    rows = weighted(4)
    del rows[2]["confidence"]
    source = write_lines(tmp_path / "weighted.jsonl", rows)
    for part in shutil.copytree(tiny_causal, tmp_path / "model").glob("*.safetensors"):
        part.unlink()
    flags = ("--model", tmp_path / "model", "--data", source, "--output", tmp_path / "out")
    assert "row 3: confidence is missing" in failure(Align, *flags)


def test_an_existing_output_is_not_overwritten(tiny_causal, data, tmp_path, failure):
    (tmp_path / "out").mkdir()
    flags = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "out")
    assert "exists already" in failure(Align, *flags)


def test_a_missing_process_is_noticed(tiny_causal, data, tmp_path, failure):
    flags = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "out")
    message = failure(Align, *flags, "--world-size", 2)
    assert "1 processes train, --world-size says 2" in message


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--lora",)])
def test_a_reference_can_be_named(lora, tiny_causal, data, tmp_path, command):
    flags = ("--data", data, "--max-steps", 2, "--learning-rate", 1e-2, "--dtype", "float32", *lora)
    named = (*flags, "--reference", tiny_causal)
    command(Align, *flags, "--model", tiny_causal, "--output", tmp_path / "first")
    command(Align, *named, "--model", tiny_causal, "--output", tmp_path / "same")
    command(Align, *named, "--model", tmp_path / "first", "--output", tmp_path / "second")
    first, same, second = (
        [line["rewards/margins"] for line in read_lines(tmp_path / name / "training.jsonl")]
        for name in ("first", "same", "second")
    )
    assert same == pytest.approx(first, abs=1e-5)
    assert first[0] == pytest.approx(0, abs=1e-6)
    # It starts away from the reference that the first alignment left.
    assert second[0] > 0.01


@pytest.mark.slow
def test_two_processes_follow_one(tiny_causal, data, tmp_path):
    flags = (
        *("--model", tiny_causal, "--data", data, "--max-steps", 3, "--learning-rate", 1e-2),
        *("--gradient-accumulation", 1, "--threads", 1, "--dtype", "float32"),
        "--precompute-reference",
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    for start, size, name in (((sys.executable,), 8, "one"), (launch, 4, "two")):
        done = subprocess.run(
            [
                *map(str, (*start, "-m", "cwpo_trainer.align", *flags)),
                *map(str, ("--batch-size", size, "--output", tmp_path / name)),
                *map(str, ("--world-size", 2 if name == "two" else 1)),
            ],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_lines(tmp_path / name / "training.jsonl") for name in ("one", "two"))
    for left, right in zip(one, two, strict=True):
        for key in ("loss", "unweighted_loss", "weight", "rewards/margins", "num_tokens"):
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5), key
    left, right = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-4)


def test_help_starts_without_torch():
    script = (
        "import sys; from cwpo_trainer import commands; "
        "assert not {'torch', 'trl', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
