"""Online alignment with immediate updates, against a real service."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from cwpo_annotator.confidence import drift
from cwpo_trainer.commands import Align, Online, Sft
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.loading import load_tokenizer
from cwpo_trainer.run.folder import last_checkpoint, read_lines, read_record

from ..launching import in_two_processes, said
from ..samples import pairs, weighted, write_lines
from ..stopping import stopped_after

PROMPTS = 8
ALIGN = {
    "batch_size": 4,
    "gradient_accumulation": 1,
    "epochs": 1,
    "learning_rate": 1.0e-2,
    "dtype": "float32",
    "threads": 1,
}


@pytest.fixture
def align_file(tmp_path):
    """`align_file(epochs=2)`: the file of --align, with these settings beside ALIGN."""

    def write(**more):
        path = tmp_path / "align.yaml"
        path.write_text("".join(f"{name}: {value}\n" for name, value in (ALIGN | more).items()))
        return path

    return write


@pytest.fixture
def flags(url, tiny_causal, tmp_path, align_file):
    prompts = [{"prompt": row["prompt"]} for row in pairs(PROMPTS)]
    return (
        *("--url", url, "--model", tiny_causal, "--align", align_file(), "--threads", 1),
        *("--prompts", write_lines(tmp_path / "prompts.jsonl", prompts)),
        # With this seed, every prompt of the first steps gets two different answers.
        *("--max-new-tokens", 6, "--update", "immediate", "--seed", 2),
    )


@pytest.fixture
def aligned(tiny_causal, tmp_path, command):
    """`aligned(rows)`: what one step of `cwpo align` on these pairs, all at once, makes."""

    def run(rows):
        output = tmp_path / "aligned"
        command(
            Align,
            *("--model", tiny_causal, "--output", output, "--max-steps", 1, "--threads", 1),
            *("--data", write_lines(tmp_path / "rows.jsonl", rows), "--dtype", "float32"),
            *("--learning-rate", ALIGN["learning_rate"]),
            *("--batch-size", len(rows), "--gradient-accumulation", 1),
        )
        return output

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def steps(folder):
    return read_lines(folder / "training.jsonl")


def texts(folder):
    return [(row["step"], row["chosen"], row["rejected"]) for row in read_lines(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_that_of_align_on_the_pairs_that_it_made(
    accumulation, flags, align_file, aligned, tmp_path, command
):
    align_file(batch_size=4 // accumulation, gradient_accumulation=accumulation, max_steps=1)
    output = tmp_path / "out"
    command(Online, *flags, "--output", output)
    rows = read_lines(output / "pairs.jsonl")
    assert len({row["prompt"] for row in rows}) == len(rows) == 4
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    (ours,), (theirs,) = steps(output), steps(aligned(rows))
    for name in ("loss", "grad_norm", "lr", "unweighted_loss", "weight", "entropy", "num_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(tmp_path / "aligned")
    for name, value in weights(output).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    assert ours["mean_confidence"] == pytest.approx(np.mean([row["confidence"] for row in rows]))
    scores = [row[f"score_{of}"] for row in rows for of in ("chosen", "rejected")]
    assert ours["mean_score"] == pytest.approx(np.mean(scores))
    assert ours["drift"] == pytest.approx(drift([row["confidence"] for row in rows], [0.0] * 11))
    assert ours["annotated"] == 1
    assert ours["kl"] == pytest.approx(0, abs=1e-5)
    # As they are trained on, with the end of the turn.
    answers = [row[of] for row in rows for of in ("chosen", "rejected")]
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    tokenised = Formatter(load_tokenizer(output)).tokenise(prompts, answers)
    lengths = [len(text.response_ids) for text in tokenised]
    assert ours["completions/mean_length"] == pytest.approx(np.mean(lengths))


@pytest.mark.slow
def test_each_step_trains_on_answers_of_the_weights_before_it(flags, align_file, tmp_path, command):
    found = {}
    for rate in (1e-12, 1e-2):
        align_file(learning_rate=rate)
        command(Online, *flags, "--output", tmp_path / str(rate))
        found[rate] = texts(tmp_path / str(rate) / "pairs.jsonl")
        assert {step for step, *_ in found[rate]} == {1, 2}
    stayed, moved = ([row for row in rows if row[0] == 1] for rows in found.values())
    assert stayed == moved
    stayed, moved = ([row for row in rows if row[0] == 2] for rows in found.values())
    assert stayed != moved


@pytest.mark.slow
def test_the_policy_learns_to_answer_as_the_annotator_prefers(
    flags, align_file, tiny_causal, tmp_path, command
):
    rows = weighted(96)
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    start, output = tmp_path / "start", tmp_path / "out"
    # It answers kindly or rudely, as often.
    command(
        Sft,
        *("--model", tiny_causal, "--data", write_lines(tmp_path / "start.jsonl", rows)),
        *("--output", start, "--epochs", 20, "--learning-rate", 2e-2, "--dtype", "float32"),
        *("--batch-size", 16, "--gradient-accumulation", 1, "--threads", 1),
    )
    prompts = write_lines(tmp_path / "prompts.jsonl", pairs(16))
    align_file(batch_size=16, max_steps=30, learning_rate=3e-3)
    flags = (*flags, "--model", start, "--prompts", prompts, "--max-new-tokens", 16)
    command(Online, *flags, "--batch-size", 32, "--output", output)
    lines = steps(output)
    scores = [line["mean_score"] for line in lines]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 1
    assert lines[-1]["kl"] > 1
    record = read_record(output)
    assert record.kind == "online"
    assert record.results["prompts"] == 16
    assert record.results["drift"] == lines[-1]["drift"]
    assert record.results["pairs"] == sum(
        row["preferred"] != "tie" for row in read_lines(output / "pairs.jsonl")
    )
    card = (output / "README.md").read_text()
    assert "with `cwpo online`" in card
    assert "| answers | of the policy itself, to 16 prompts |" in card


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(
    flags, align_file, tmp_path, command, failure, capfd
):
    align_file(batch_size=2, gradient_accumulation=2, epochs=6)
    flags = (*flags, "--drift-window", 4)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    partial = stopped.with_name(".stopped.partial")
    log = partial / "training.jsonl"
    message = stopped_after(3, log, "cwpo_trainer.online", *flags, "--output", stopped)
    assert "continue with --resume" in message
    assert last_checkpoint(partial) is not None
    again = (Online, *flags, "--output", stopped)
    assert "continue with --resume" in failure(*again)
    assert "top_p was 1.0" in failure(*again, "--resume", "--top-p", 0.5)
    command(*again, "--resume")
    command(Online, *flags, "--output", whole)
    assert "has drifted by" in capfd.readouterr().err
    assert [line["step"] for line in steps(whole)] == [*range(1, 13)]
    for left, right in zip(steps(stopped), steps(whole), strict=True):
        # Tokens are counted from the start of the process.
        assert left | {"num_tokens": 0} == right | {"num_tokens": 0}
    assert (stopped / "pairs.jsonl").read_text() == (whole / "pairs.jsonl").read_text()
    # Each epoch asks for each prompt once.
    asked = [row["prompt"] for row in read_lines(whole / "pairs.jsonl")]
    assert max(map(asked.count, asked)) <= 6
    expected = weights(whole)
    for name, value in weights(stopped).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_make_one_step(flags, align_file, aligned, tmp_path):
    align_file(epochs=2)
    output, worker = tmp_path / "out", Path(__file__).with_name("online_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", worker]
    words = [*map(str, (*launch, tmp_path, *flags, "--output", output))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_lines(output / "pairs.jsonl")
    for step in (1, 2):
        asked = {row["prompt"] for row in rows if row["step"] == step}
        assert len(asked) == PROMPTS
    assert len(rows) == 2 * PROMPTS
    # The gradient is that over the pairs of both.
    (theirs,) = steps(aligned([row for row in rows if row["step"] == 1]))
    ours = steps(output)[0]
    for name in ("loss", "grad_norm", "weight", "num_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    left, right = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (0, 1))
    saved = weights(output)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert name not in saved or torch.equal(value, saved[name]), name


@pytest.fixture(scope="module")
def often_ended(tiny_causal, tmp_path_factory):
    """The folder of a policy whose answers end at many tokens, and so at different places."""
    folder = tmp_path_factory.mktemp("often-ended") / "policy"
    shutil.copytree(tiny_causal, folder)
    config = GenerationConfig.from_pretrained(folder)
    config.eos_token_id = [config.eos_token_id, *range(300, 360)]
    config.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_processes_that_share_the_policy_make_the_pairs_of_ones_that_do_not(
    flags, align_file, often_ended, tmp_path
):
    flags = (*flags, "--model", often_ended, "--batch-size", 3, "--max-new-tokens", 12)
    ways = {"full": {}, "lora": {"lora": "true", "lora_rank": 2}}
    runs = {}
    for way, sharding in product(ways, ("none", "fsdp2")):
        settings = align_file(epochs=3, batch_size=2, sharding=sharding, **ways[way])
        file = settings.rename(tmp_path / f"{way}-{sharding}.yaml")
        runs[f"{way} {sharding}"] = ("online", (*flags, "--align", file), None)
    in_two_processes(tmp_path, runs)
    for name in runs:
        printed = said(tmp_path, name)
        assert all(each.endswith("exit code 0\n") for each in printed), printed
        assert ("gathered its shares" in printed[0]) == name.endswith("fsdp2")
    for way in ways:
        apart, shared = (tmp_path / f"{way} {sharding}" for sharding in ("none", "fsdp2"))
        rows = texts(apart / "pairs.jsonl")
        assert rows == texts(shared / "pairs.jsonl")
        assert len({len(text.split()) for _, *both in rows for text in both}) > 3
        for left, right in zip(steps(apart), steps(shared), strict=True):
            for name in ("loss", "kl", "mean_confidence", "completions/mean_length"):
                assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), name
        expected = weights(apart)
        for name, value in weights(shared).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_of_more_answers_the_best_and_the_worst_are_compared(flags, tmp_path, command):
    output = tmp_path / "out"
    command(Online, *flags, "--output", output, "--responses", 5)
    rows = read_lines(output / "pairs.jsonl")
    sampled = [row["confidence_as_sampled"] for row in rows]
    assert np.mean(sampled) < np.mean([row["confidence"] for row in rows])
    assert steps(output)[-1]["drift"] == pytest.approx(drift(np.array(sampled), [0.0] * 11))


@pytest.mark.slow
def test_an_adapter_is_trained_and_evaluated(flags, align_file, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(6))
    align_file(lora="true", lora_rank=2, eval_data=data, confidence_as="soft_label")
    output = tmp_path / "out"
    command(Online, *flags, "--output", output)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    (evaluation,) = [line for line in steps(output) if "eval_loss" in line]
    assert evaluation["eval_loss"] > 0
    assert read_record(output).results["eval_pairs"] == 6


@pytest.mark.slow
def test_prompts_without_a_label_have_no_weight(flags, align_file, tmp_path, command):
    """At so low a temperature, both answers are the likeliest ones."""
    align_file(max_steps=1)
    output = tmp_path / "out"
    command(Online, *flags, "--output", output, "--temperature", 1e-4)
    (line,) = steps(output)
    assert line["loss"] == line["grad_norm"] == line["annotated"] == line["rewards/margins"] == 0
    assert read_lines(output / "pairs.jsonl") == []
    assert read_record(output).results["pairs"] == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": "rank"}, "weight: rank is not for --update immediate"),
        ({"weight": "certified"}, "a certificate is of labels like those"),
        ({"normalise": "true"}, "normalise is not for --update immediate"),
        ({"eval_fraction": 0.1}, "use eval_data"),
        ({"reference_cache": "cache"}, "its pairs are not known before the step"),
        ({"sharding": "zero3"}, "answers are sampled by FSDP2 alone; use sharding: fsdp2"),
        ({"labels": "human"}, "the annotator labels the answers"),
    ],
)
def test_a_setting_that_needs_all_pairs_is_refused_first(
    settings, reason, align_file, tmp_path, failure
):
    words = ("--prompts", tmp_path / "none", "--output", tmp_path / "out", "--model", "nowhere")
    message = failure(Online, *words, "--align", align_file(**settings), "--update", "immediate")
    assert reason in message


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--update", "immediate", "--rounds", 2), "--rounds belongs to --update rounds"),
        (("--update", "immediate", "--dtype", "float32"), "--dtype belongs to --update rounds"),
        (("--drift-window", 9), "--drift-window needs --update immediate"),
    ],
)
def test_a_flag_of_the_other_update_is_refused(words, reason, tmp_path, failure):
    common = ("--prompts", tmp_path / "none", "--output", tmp_path / "out", "--model", "nowhere")
    assert reason in failure(Online, *common, *words)


@pytest.mark.slow
def test_prompts_too_long_are_left_out(flags, align_file, tmp_path, command, failure, capsys):
    rows = [{"prompt": "why"}, {"prompt": "please " * 60}]
    write_lines(tmp_path / "prompts.jsonl", rows)
    align_file(max_length=40, max_steps=1)
    output = tmp_path / "out"
    command(Online, *flags, "--output", output)
    assert "1 of 2 prompts left out: longer than the 34 tokens" in capsys.readouterr().err
    assert read_record(output).results["prompts_too_long"] == 1
    align_file(max_length=7)
    assert "all 2 prompts are longer than the 1 tokens" in failure(
        Online, *flags, "--output", tmp_path / "none"
    )


@pytest.mark.slow
def test_what_the_annotator_refuses_is_told_once(flags, align_file, tmp_path, command, capsys):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "why"}, {"prompt": "please " * 140}])
    align_file(batch_size=2, epochs=2)
    command(Online, *flags, "--output", tmp_path / "out")
    assert capsys.readouterr().err.count("the annotator refuses a pair, as too_long: ") == 1
    assert [line["annotated"] for line in steps(tmp_path / "out")] == [0.5, 0.5]
    command(Online, *flags, "--output", tmp_path / "cut", "--truncation", "prompt_left")
    assert [line["annotated"] for line in steps(tmp_path / "cut")] == [1, 1]


@pytest.mark.slow
def test_calibration_that_the_annotator_lacks_is_refused(flags, align_file, tmp_path, failure):
    align_file(calibrated="true")
    message = failure(Online, *flags, "--output", tmp_path / "out")
    assert "the annotator annotator has no calibration temperature" in message
