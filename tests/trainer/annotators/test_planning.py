from __future__ import annotations

from pathlib import Path

import pytest

from cwpo_annotator.encoding.encoder import Encoder
from cwpo_annotator.encoding.responses import encoder_of
from cwpo_trainer.annotators.base_model import (
    add_lora,
    load_causal,
    load_with_scalar_head,
    outline,
)
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.implicit_reward import ResponseReader
from cwpo_trainer.annotators.pipeline import encode, train_annotator
from cwpo_trainer.annotators.planning import plan
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.data.splits import validation_split
from cwpo_trainer.plan.estimate import DEVICES, Shape
from cwpo_trainer.run.folder import read_lines
from cwpo_trainer.settings.annotator_training import AnnotatorTraining

from ..plan.measured import assert_near_peak, counted_by_torch, planned
from ..samples import pairs, write_lines

ALL = {"held_out_fraction": 0, "validation_fraction": 0}


@pytest.fixture
def data(tmp_path):
    return str(write_lines(tmp_path / "pairs.jsonl", pairs(16)))


@pytest.fixture
def settings(wide_models, data, tmp_path):
    def make(model="llama", **more):
        given = dict(model=str(wide_models / model), data=data, output=tmp_path / "out", threads=1)
        return AnnotatorTraining(**given | ALL | dict(dtype="float32", max_length=128) | more)

    return make


def planned_for(settings):
    folder = Path(settings.model)
    encoder = encoder_of(settings.objective).create(folder, max_length=settings.max_length)
    rows = read_pairs(settings.data)
    training, validating = validation_split(rows, settings.validation_fraction, seed=settings.seed)
    read = [encode(encoder, part).pairs for part in (training, validating)]
    return plan(settings, folder, read[0], validating=read[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tolerance", "more"),
    [
        ("llama", 0.2, {"batch_size": 4}),
        ("llama", 0.2, {"batch_size": 16, "gradient_checkpointing": True}),
        ("llama", 0.2, {"batch_size": 16, "lora": True}),
        ("llama", 0.2, {"batch_size": 16, "token_budget": 64}),
        ("llama", 0.2, {"batch_size": 8, "objective": "dpo"}),
        # Its layers keep fewer activations than those with gated units.
        ("opt", 0.4, {"batch_size": 8, "objective": "sft+dpo"}),
    ],
)
def test_the_estimate_is_near_the_measured_peak(model, tolerance, more, settings):
    run = settings(model, max_steps=2, **more)
    assert_near_peak(planned_for(run), lambda: train_annotator(run), tolerance)


def tried(settings):
    """Finding out whether the model reads packed rows."""
    folder, budget = Path(settings.model), PassBudget(None, "cpu")
    if settings.objective == "bt":
        model = load_with_scalar_head(folder, Encoder.create(folder))
        readers = [lambda: ScalarHeadScorer(model, 0, budget, bfloat16=False)]
    else:
        model = load_causal(folder)
        readers = [lambda: ResponseReader(model, budget)]
        if settings.objective == "sft+dpo":
            readers *= 2
    add_lora(model, settings)
    for reader in readers:
        reader().restore()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({}, 0.01),
        ({"objective": "dpo"}, 0.01),
        ({"objective": "sft+dpo"}, 0.01),
        # Nothing before the first adapters is trained, so that their inputs need no gradient.
        ({"lora": True}, 0.06),
    ],
)
def test_operations_are_those_that_torch_counts(more, tolerance, settings, tmp_path):
    # Texts of a length, so that few tokens are read of prompts that begin alike.
    words = {"response_a": "kind good help", "response_b": "good kind help", "preferred": "a"}
    rows = [row | words for row in pairs(8)]
    data = write_lines(tmp_path / "alike.jsonl", rows)
    run = settings(batch_size=4, epochs=1, data=str(data), **more)
    counted = counted_by_torch(lambda: train_annotator(run))
    counted -= counted_by_torch(lambda: tried(run))
    assert planned_for(run).operations(on_cpu=True) == pytest.approx(counted, rel=tolerance)


def test_a_dry_run_counts_the_steps_and_tokens(tiny_causal, tmp_path, command, capsys):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(40))
    flags = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "out")
    flags = (*flags, "--batch-size", 6, "--epochs", 2, "--max-length", 64)
    # Of another machine than this one.
    command(
        TrainAnnotator, *flags, "--dry-run", "--sharding", "fsdp2", "--world-size", 8,
        "--objective", "sft+dpo",
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()
    assert "SFT 6 steps on the chosen responses" in said
    assert "pairs 32 to train on, 0 too long; 4 to validate on, 4 held out" in said
    assert "validation 2 times, on 4 pairs" in said
    assert "each of 6 pairs over all processes" in said
    assert "H100 80 GB" in said
    command(TrainAnnotator, *flags, "--dry-run")
    tokens, steps = planned(capsys)
    command(TrainAnnotator, *flags)
    assert len(read_lines(tmp_path / "out" / "training.jsonl")) == steps == 12
    encoder = Encoder.create(tiny_causal, max_length=64)
    read = encode(encoder, read_pairs(str(data)))
    mean = sum(pair.tokens for pair in read.pairs) / 40
    assert tokens == pytest.approx(32 * mean, rel=0.05)


def test_pairs_that_are_only_read_take_a_third_of_an_epoch(settings, wide_models):
    run = settings(batch_size=4, epochs=1, validate_every=2, validation_fraction=0.1)
    folder = wide_models / "llama"
    encoder = encoder_of("bt").create(folder, max_length=128)
    read = encode(encoder, read_pairs(run.data)).pairs
    epoch = plan(run, folder, read).operations()
    held_out = plan(run, folder, read, held_out=read).operations() - epoch
    # Training reads packed rows in batches, which are filled up, and the head once more.
    assert held_out == pytest.approx(epoch / 3, rel=0.1)
    # Four steps are checked twice.
    checked = plan(run, folder, read, validating=read).operations() - epoch
    assert checked == pytest.approx(2 * held_out)


def test_sharing_checkpointing_and_adapters_need_less(settings):
    def total(devices=1, **more):
        return planned_for(settings(batch_size=16, **more)).memory(devices).total

    whole = total()
    assert total(8) < whole
    assert total(gradient_checkpointing=True) < whole
    assert total(lora=True) < whole
    assert total(token_budget=64) < whole


@pytest.mark.parametrize("scalar_head", [True, False])
def test_main_memory_is_what_is_loaded(scalar_head, settings, wide_models):
    objective = "bt" if scalar_head else "dpo"
    run = settings(objective=objective, lora=True, dtype="bfloat16", layers=2)
    folder = wide_models / "llama"
    model = (
        load_with_scalar_head(folder, Encoder.create(folder), layers=2)
        if scalar_head
        else load_causal(folder, layers=2)
    )
    held = sum(weight.nbytes for weight in model.parameters())
    assert planned_for(run).loaded == (pytest.approx(held, rel=1e-6), 0)


def test_an_encoder_has_padded_batches(tiny_bert, data, tmp_path):
    run = AnnotatorTraining(
        model=str(tiny_bert), data=data, output=tmp_path / "out", token_budget=128, max_length=64
    )
    shape = Shape.of(outline(tiny_bert, scalar_head=True))
    model = load_with_scalar_head(tiny_bert, Encoder.create(tiny_bert, max_length=64))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    planned = planned_for(run)
    assert not planned.method.packed
    assert planned.devices_needed(DEVICES[0]) == 1
    assert planned.operations() > 6 * shape.linear_parameters
