"""Learning rate, log, attention, adapters and checkpoints of a run, as flags say."""

from __future__ import annotations

import json
import math

import pytest

from cwpo_trainer.commands import Align, Sft, TrainAnnotator
from cwpo_trainer.plan.schedule import steps_between_checkpoints
from cwpo_trainer.policy.loading import load_for_training
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import weighted, write_lines

UNREAD = ("--model", "unread", "--data", "unread.jsonl", "--output", "unwritten")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def flags(tiny_causal, tmp_path, output):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(24))
    return (
        *("--model", tiny_causal, "--data", data, "--dtype", "float32", "--threads", 1),
        *("--batch-size", 4, "--gradient-accumulation", 1, "--learning-rate", 1e-2),
        *("--max-steps", 6, "--output", output),
    )


def log_of(output, name="loss"):
    lines = read_lines(output / "training.jsonl")
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize(
    ("more", "rates"),
    [
        (("--schedule", "constant"), [1e-2] * 6),
        (("--schedule", "linear"), [1e-2 * left / 6 for left in range(6, 0, -1)]),
        ((), [5e-3 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
        (
            ("--schedule", "cosine_with_min_lr", "--set", 'lr_scheduler_kwargs={"min_lr": 5e-3}'),
            [5e-3 + 2.5e-3 * (1 + math.cos(math.pi * step / 6)) for step in range(6)],
        ),
    ],
    ids=["constant", "linear", "cosine", "cosine_with_min_lr"],
)
def test_the_learning_rate_follows_the_schedule(more, rates, flags, output, command):
    command(Sft, *flags, *more)
    assert [*log_of(output, "lr").values()] == pytest.approx(rates)


def test_a_schedule_that_lacks_a_constant_is_refused(flags, failure):
    message = failure(Sft, *flags, "--schedule", "warmup_stable_decay")
    assert "--schedule warmup_stable_decay: " in message
    assert "--set lr_scheduler_kwargs" in message
    message = failure(Sft, *flags, "--set", 'lr_scheduler_kwargs={"cycles": 2}')
    assert "--schedule cosine: " in message


def test_a_line_of_the_log_is_the_mean_of_its_steps(flags, output, tmp_path, command):
    other = write_lines(tmp_path / "other.jsonl", weighted(4, seed=5))
    flags = (*flags, "--eval-data", other, "--eval-steps", 3)
    command(Align, *flags)
    each, margins = log_of(output), log_of(output, "rewards/margins")
    command(Align, *flags, "--logging-steps", 4, "--output", tmp_path / "fewer")
    fewer = log_of(tmp_path / "fewer")
    # Before an evaluation and at the end there is one in any case.
    assert [*fewer] == [3, 4, 6]
    wanted = [sum(each[step] for step in (1, 2, 3)) / 3, each[4], (each[5] + each[6]) / 2]
    assert [*fewer.values()] == pytest.approx(wanted, rel=1e-4)
    wanted = (margins[5] + margins[6]) / 2
    assert log_of(tmp_path / "fewer", "rewards/margins")[6] == pytest.approx(wanted, rel=1e-4)
    assert [*log_of(tmp_path / "fewer", "eval_loss")] == [3, 6]


def test_attention_is_for_texts_that_are_read_by_themselves(flags, output, tmp_path, command):
    command(Align, *flags, "--no-share-prompts", "--attn-implementation", "eager")
    command(Align, *flags, "--no-share-prompts", "--output", tmp_path / "default")
    assert log_of(output) == pytest.approx(log_of(tmp_path / "default"), rel=1e-3)


def test_the_model_has_the_attention_that_is_asked_for(tiny_causal):
    for attention, found in (("eager", "eager"), (None, "sdpa")):
        model = load_for_training(
            str(tiny_causal), is_frozen=False, bfloat16=False, attention=attention
        )
        assert model.config._attn_implementation == found


@pytest.mark.parametrize("targets", ["flag", "file"])
def test_adapters_are_for_the_modules_that_are_named(targets, flags, tmp_path, output, command):
    more = ("--lora-targets", "v_proj,q_proj")
    if targets == "file":
        (tmp_path / "sft.yaml").write_text("lora_targets: [v_proj, q_proj]\n")
        more = ("--config", tmp_path / "sft.yaml")
    command(Sft, *flags, "--lora", "--adapter-only", *more)
    config = json.loads((output / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    again = ("--model", output, "--lora", "--output", tmp_path / "again", "--max-steps", 1)
    command(Sft, *flags, *again)
    assert read_record(tmp_path / "again").settings["lora_targets"] == ["q_proj", "v_proj"]


def test_targets_that_are_not_there_are_refused(flags, tmp_path, output, command, failure):
    for target in ("qproj", "proj", "lm_head", "norm"):
        message = failure(Sft, *flags, "--lora", "--lora-targets", f"v_proj,{target}")
        assert f"--lora-targets {target}: no linear layer has this name" in message
        assert "the model has down_proj, gate_proj, k_proj, o_proj, q_proj" in message
    command(Sft, *flags, "--lora", "--adapter-only", "--lora-targets", "v_proj", "--max-steps", 1)
    again = ("--model", output, "--lora", "--output", tmp_path / "again")
    message = failure(Sft, *flags, *again, "--lora-targets", "q_proj")
    assert "which is trained further, has ['v_proj']" in message


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (Align, ("--attn-implementation", "sdpa"), "add --no-share-prompts"),
        (
            Align,
            ("--no-share-prompts", "--attn-implementation", "flash_attention_2"),
            "needs a CUDA GPU",
        ),
        (Sft, ("--schedule", "constant", "--warmup-steps", 3), "use constant_with_warmup"),
        (Sft, ("--lora-targets", "q_proj"), "--lora-targets needs --lora"),
        (TrainAnnotator, ("--lora-targets", "q_proj"), "--lora-targets needs --lora"),
        (Sft, ("--keep-best",), "--keep-best: nothing to evaluate on"),
        (Sft, ("--patience", 2), "--patience: nothing to evaluate on"),
        (Sft, ("--set", "lr_scheduler_type=linear"), "use --schedule"),
        (Sft, ("--set", "load_best_model_at_end=true"), "use --keep-best"),
        (Sft, ("--report-to", "mlfow"), "--report-to mlfow: transformers knows azure_ml, "),
        (Sft, ("--report-to", "none,tensorboard"), "--report-to none: transformers knows"),
        (Sft, ("--report-to", "tensorboard,clearml"), "`pip install clearml`"),
        (Sft, ("--report-to", "azure_ml"), "`pip install azureml-core`"),
    ],
)
def test_what_has_no_effect_or_cannot_be_had_is_refused(kind, more, message, failure):
    assert message in failure(kind, *UNREAD, *more)


def test_long_runs_save_checkpoints_by_default():
    by_default = {steps: steps_between_checkpoints(None, steps) for steps in (20, 1999, 30_000)}
    assert by_default == {20: 200, 1999: 200, 30_000: 3000}
    assert steps_between_checkpoints(0, 30_000) == 0
    assert steps_between_checkpoints(7, 30_000) == 7
