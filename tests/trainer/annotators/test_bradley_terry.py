from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.rows.packing import pack_pairs
from cwpo_annotator.calibration import likelihood_loss
from cwpo_annotator.checkpoint import read_card
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer.annotators.base_model import load_with_scalar_head
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.pipeline import encode
from cwpo_trainer.annotators.scalar_head import ScalarHeadScorer
from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.data.splits import split, validation_split
from cwpo_trainer.evaluation.agreement import judge_pairs, measure
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, write_lines


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(120))


FLAGS = ("--batch-size", 16, "--epochs", 8, "--learning-rate", 3e-3, "--max-length", 64)
FLAGS += ("--threads", 1)


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


@pytest.mark.slow
def test_the_loss_falls_and_the_annotator_agrees_with_people(trained):
    log = read_lines(trained / "annotator" / "training.jsonl")
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    assert log[0]["loss"] > 0.5
    assert log[-1]["loss"] < 0.1
    card = read_card(trained / "annotator")
    assert card.held_out.pairs == 24
    assert card.held_out.accuracy > 0.9
    bins = card.held_out.bins
    assert sum(part.pairs for part in bins) == 24
    right = sum(part.pairs * part.accuracy for part in bins)
    assert right / 24 == pytest.approx(card.held_out.accuracy)
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
    assert metrics.ece < 0.2


def test_an_encoder_can_be_an_annotator(tiny_bert, labelled, tmp_path, command):
    command(
        TrainAnnotator, "--model", tiny_bert, "--data", labelled, "-o", tmp_path / "out", *FLAGS
    )
    assert read_card(tmp_path / "out").held_out.accuracy > 0.8


@pytest.mark.slow
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


@pytest.mark.slow
def test_bfloat16_keeps_its_scores_apart(tiny_causal, labelled, tmp_path, command):
    command(
        TrainAnnotator,
        *("--model", tiny_causal, "--data", labelled, "--output", tmp_path / "out", *FLAGS),
        *("--dtype", "bfloat16"),
    )
    card = read_card(tmp_path / "out")
    assert card.held_out.accuracy > 0.9
    assert len(set(card.confidence_quantiles)) == 11


def test_progress_and_what_is_cut_or_left_out_are_said(tiny_causal, tmp_path, command, capsys):
    rows = pairs(20)
    rows[3]["prompt"] = "the day " * 100
    rows[5]["response_a"] = "the day " * 100
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    command(
        TrainAnnotator,
        *("--model", tiny_causal, "--data", source, "--output", tmp_path / "out"),
        *("--max-length", 64, "--held-out-fraction", 0, "--max-steps", 1),
        *("--validation-fraction", 0),
    )
    said = capsys.readouterr().err
    assert "1 of 20 pairs left out: 1 response_too_long. Keep them with a larger `--max-le" in said
    assert "annotator: 1 of 1 steps, loss 0." in said
    assert "1 of 19 pairs lost the oldest tokens of their prompt to fit into 64 tokens." in said
    results = json.loads((tmp_path / "out" / "run.json").read_text())["results"]
    assert results["pairs"] == 19
    assert results["pairs_too_long"] == results["prompts_truncated"] == 1
    assert results["temperature"] is None


def test_the_temperature_comes_from_labelled_pairs_kept_out_of_training(trained):
    card = read_card(trained / "annotator")
    results = read_record(trained / "annotator").results
    assert results["pairs"] + results["validation_pairs"] == card.labelled_pairs == 67
    assert card.calibration_pairs == results["validation_pairs"] == 7
    assert card.temperature == results["temperature"] > 0
    assert card.held_out.ece is not None
    assert card.held_out.calibrated_ece is not None
    held_out = read_pairs(str(trained / "splits" / "held_out.jsonl"))[0]
    (annotation,) = Annotator.load(trained / "annotator").annotate(
        [Triplet(prompt=held_out.prompt, response_a=held_out.chosen, response_b=held_out.rejected)]
    )
    margin = abs(annotation.score_a - annotation.score_b)
    assert annotation.calibrated_confidence == pytest.approx(
        np.tanh(margin / (2 * card.temperature)), rel=1e-4
    )


SHORT = ("--batch-size", 8, "--max-length", 64, "--held-out-fraction", 0)


def validated(folder):
    lines = read_lines(folder / "training.jsonl")
    return {line["step"]: line for line in lines if "validation_loss" in line}


@pytest.mark.slow
def test_training_stops_early_and_keeps_the_best_weights(tiny_causal, tmp_path, command):
    # Labels that are coin tosses: what is learnt of them does not carry over.
    rows = pairs(60)
    for at, row in enumerate(rows):
        row["preferred"] = "ab"[(at * 7 + at // 3) % 2]
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    flags = ("--model", tiny_causal, "--data", source, *SHORT, "--learning-rate", 3e-3)
    flags += ("--epochs", 40, "--validation-fraction", 0.3, "--dtype", "float32")
    command(TrainAnnotator, *flags, "--patience", 2, "--output", tmp_path / "out")
    checks = validated(tmp_path / "out")
    best = min(checks, key=lambda step: checks[step]["validation_loss_calibrated"])
    assert read_record(tmp_path / "out").results["best_step"] == best
    assert list(checks).index(best) == len(checks) - 3
    assert max(checks) < 40 * 6
    labelled = split(
        read_pairs(str(source)), labelled_fraction=1.0, held_out_fraction=0.0, seed=0
    ).labelled
    _, validation = validation_split(labelled, 0.3, seed=0)
    annotator = Annotator.load(tmp_path / "out", dtype="float32")
    margins = judge_pairs(annotator, validation).margins
    saved = likelihood_loss(margins)
    assert saved == pytest.approx(checks[best]["validation_loss"], rel=1e-4)
    assert saved != pytest.approx(checks[max(checks)]["validation_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_causal", "tiny_bert"])
def test_lora_leaves_a_plain_model(model, labelled, tmp_path, command, request):
    folder = request.getfixturevalue(model)
    flags = ("--model", folder, "--data", labelled, *SHORT, "--lora", "--learning-rate", 1e-2)
    command(TrainAnnotator, *flags, "--max-steps", 30, "--output", tmp_path / "out")
    start = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).state_dict()
    end = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("attention" in name or "attn" in name for name in changed)
    assert not any("embed" in name or "norm" in name.lower() for name in changed)
    checks = validated(tmp_path / "out")
    assert checks[30]["validation_loss"] < 0.5


@pytest.mark.parametrize("model", ["tiny_causal", "tiny_bert"])
def test_the_first_layers_can_be_kept(model, labelled, tmp_path, command, request):
    folder = request.getfixturevalue(model)
    flags = ("--model", folder, "--data", labelled, *SHORT, "--max-steps", 1)
    command(TrainAnnotator, *flags, "--layers", 1, "--output", tmp_path / "out")
    end = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert end.config.num_hidden_layers == 1
    start = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    first = {name for name in end.state_dict() if ".0." in name}
    assert first
    for name in first:
        difference = (start.state_dict()[name] - end.state_dict()[name]).abs().max()
        assert difference < 1e-3, name


def test_more_layers_than_there_are_is_one_line(tiny_causal, labelled, tmp_path, command):
    flags = ("--model", tiny_causal, "--data", labelled, "--layers", 3)
    with pytest.raises(SystemExit, match="the model has 2 layers"):
        command(TrainAnnotator, *flags, "--output", tmp_path / "out")


def all_pairs_of_a_prompt(encoder):
    """Those of four responses, which make one row."""
    prompt = "what is the word that some people were there for, and why cat? " * 2
    answers = ["no", "because good", "because good no", "word " * 9]
    triplets = [
        Triplet(prompt=prompt, response_a=a, response_b=b) for a, b in permutations(answers, 2)
    ]
    pairs = encoder.encode_pairs(triplets)
    (row,) = pack_pairs(pairs, 1024)
    assert len(row.runs) == len(answers)
    return pairs


@pytest.mark.slow
def test_packed_training_follows_padded(tiny_causal, labelled, tmp_path):
    encoder = Encoder.create(tiny_causal, max_length=128)
    batch = encode(encoder, read_pairs(str(labelled))[:9]).pairs
    batch = [*batch, *all_pairs_of_a_prompt(encoder)]
    gradients, margins = [], []
    for packed in (True, False):
        scorer = scorer_of(tiny_causal, encoder)
        assert scorer.shares_prompts
        if not packed:
            scorer.restore()
            scorer.shares_prompts = False
        scores = torch.cat([*scores_of(scorer, batch)]).detach().numpy()
        margins.append(np.sort(scores[:, 0] - scores[:, 1]))
        gradients.append(gradients_of(scorer.model, scores_of(scorer, batch)))
    np.testing.assert_allclose(margins[0], margins[1], atol=1e-5)
    assert_same_gradients(gradients[0], gradients[1])


def scorer_of(folder, encoder, token_budget=None):
    torch.manual_seed(0)
    model = load_with_scalar_head(folder, encoder)
    budget = PassBudget(token_budget, "cpu")
    return ScalarHeadScorer(model, encoder.pad_token_id, budget, bfloat16=False)


def scores_of(scorer, pairs):
    return (read() for read in scorer.passes(pairs))


def gradients_of(model, scores):
    """The gradients of the loss, from the scores of each forward pass."""
    for part in scores:
        (-torch.nn.functional.logsigmoid(part[:, 0] - part[:, 1])).sum().backward()
    return {name: value.grad for name, value in model.named_parameters()}


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_causal", "tiny_bert"])
def test_texts_of_several_pairs_are_read_once_and_learnt_from_as_often(model, request):
    folder = request.getfixturevalue(model)
    encoder = Encoder.create(folder, max_length=128)
    # Each pair in one order: the gradients of both would nearly cancel.
    batch = [pair for pair in all_pairs_of_a_prompt(encoder) if [*pair.a] < [*pair.b]]
    scorer = scorer_of(folder, encoder, token_budget=4096)
    read = []
    embeddings = scorer.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    gradients = gradients_of(scorer.model, scores_of(scorer, batch))
    texts = {tuple(text) for pair in batch for text in pair.texts}
    assert sum(read) <= len(texts) * max(map(len, texts))
    alone = scorer_of(folder, encoder)
    alone.restore()
    scores = (
        torch.stack([alone.model(torch.tensor([[*text]])).logits[0] for text in pair.texts], dim=1)
        for pair in batch
    )
    expected = gradients_of(alone.model, scores)
    of_all, expected_of_all = (
        torch.cat([value.flatten() for value in found.values() if value is not None])
        for found in (gradients, expected)
    )
    assert expected_of_all.norm() > 1e-3
    assert (of_all - expected_of_all).norm() < 1e-4 * expected_of_all.norm()
