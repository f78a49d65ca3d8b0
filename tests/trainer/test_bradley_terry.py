from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import read_card
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.data import read_pairs
from cwpo_trainer.evaluation.annotator import measure
from cwpo_trainer.record import read_lines, read_record

from .samples import pairs, write_lines


@pytest.fixture(scope="module")
def tiny_bert(tiny_tokenizer, tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    BertModel(
        BertConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(120))


FLAGS = ("--batch-size", 16, "--epochs", 8, "--learning-rate", 3e-3, "--max-length", 64)


@pytest.fixture(scope="module")
def trained(tiny_causal, labelled, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    output = root / "annotator"
    TrainAnnotator(
        model=str(tiny_causal),
        data=str(labelled),
        output=output,
        splits=root / "splits",
        batch_size=16,
        epochs=8,
        learning_rate=3e-3,
        max_length=64,
        labelled_fraction=0.7,
        held_out_fraction=0.2,
        dtype="float32",
    ).cli_cmd()
    return root


def test_the_loss_falls_and_the_annotator_agrees_with_people(trained):
    log = read_lines(trained / "annotator" / "training.jsonl")
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    assert log[0]["loss"] > 0.5
    assert log[-1]["loss"] < 0.1
    card = read_card(trained / "annotator")
    assert card.held_out.pairs == 24
    assert card.held_out.accuracy > 0.9
    assert card.labelled_pairs == 67
    assert card.encoding.max_length == 64
    assert len(card.confidence_quantiles) == 11
    assert read_record(trained / "annotator").kind == "train-annotator"


def test_the_checkpoint_scores_as_hugging_face_does(trained):
    folder = trained / "annotator"
    held_out = read_pairs(str(trained / "splits" / "held_out.jsonl"))
    triplets = [
        Triplet(prompt=pair.prompt, response_a=pair.chosen, response_b=pair.rejected)
        for pair in held_out
    ]
    ours = Annotator.load(folder, dtype="float32").annotate(triplets)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_labels == 1
    for triplet, annotation in zip(triplets, ours, strict=True):
        text = f"{triplet.prompt}\n\n{triplet.response_a}{tokenizer.eos_token}"
        with torch.no_grad():
            score = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert annotation.score_a == pytest.approx(score, abs=1e-4)


def test_a_large_held_out_set_gives_a_temperature(tiny_causal, labelled, tmp_path, command):
    flags = ("--model", tiny_causal, "--data", labelled, "--output", tmp_path / "out", *FLAGS)
    command(TrainAnnotator, *flags, "--held-out-fraction", 0.5)
    temperature = read_card(tmp_path / "out").temperature
    assert temperature is not None
    triplet = Triplet(prompt="what", response_a="kind good help", response_b="rude bad")
    (annotation,) = Annotator.load(tmp_path / "out").annotate([triplet])
    margin = annotation.score_a - annotation.score_b
    expected = np.tanh(abs(margin) / (2 * temperature))
    assert annotation.calibrated_confidence == pytest.approx(expected, rel=1e-4)


def test_splits_share_no_prompt(trained):
    prompts = [
        {pair.prompt for pair in read_pairs(str(trained / "splits" / f"{name}.jsonl"))}
        for name in ("labelled", "unlabelled", "held_out")
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 120


def test_confidence_ranks_the_pairs(trained):
    unseen = read_pairs(str(trained / "splits" / "unlabelled.jsonl"))
    metrics = measure(Annotator.load(trained / "annotator"), unseen)
    assert metrics.pairs == len(unseen)
    assert metrics.failed == 0
    assert metrics.accuracy > 0.9
    assert [item.lowest for item in metrics.bins] == sorted(item.lowest for item in metrics.bins)
    assert sum(item.pairs for item in metrics.bins) == metrics.pairs
    weights = np.array([item.pairs for item in metrics.bins])
    by_bin = np.array([item.accuracy for item in metrics.bins])
    assert metrics.accuracy == pytest.approx((weights * by_bin).sum() / weights.sum())
    assert 0 <= metrics.ece < 0.2


def test_an_encoder_can_be_an_annotator(tiny_bert, labelled, tmp_path, command):
    command(
        TrainAnnotator, "--model", tiny_bert, "--data", labelled, "-o", tmp_path / "out", *FLAGS
    )
    assert read_card(tmp_path / "out").held_out.accuracy > 0.8


def test_training_is_deterministic(tiny_causal, labelled, tmp_path, command):
    weights = []
    for name in ("one", "two"):
        command(
            TrainAnnotator,
            *("--model", tiny_causal, "--data", labelled, "--output", tmp_path / name),
            *("--max-steps", 3, "--batch-size", 8),
        )
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_bfloat16_keeps_its_scores_apart(tiny_causal, labelled, tmp_path, command):
    command(
        TrainAnnotator,
        *("--model", tiny_causal, "--data", labelled, "--output", tmp_path / "out", *FLAGS),
        *("--dtype", "bfloat16"),
    )
    card = read_card(tmp_path / "out")
    assert card.held_out.accuracy > 0.9
    assert len(set(card.confidence_quantiles)) == 11


def test_what_is_cut_or_left_out_is_said(tiny_causal, tmp_path, command, capsys):
    rows = pairs(20)
    rows[3]["prompt"] = "the day " * 100
    rows[5]["response_a"] = "the day " * 100
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    command(
        TrainAnnotator,
        *("--model", tiny_causal, "--data", source, "--output", tmp_path / "out"),
        *("--max-length", 64, "--held-out-fraction", 0, "--max-steps", 1),
    )
    assert "of 20 pairs, 1 prompts were cut to 64 tokens" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "run.json").read_text())["results"]
    assert results == {"pairs": 19, "pairs_too_long": 1, "prompts_truncated": 1}
