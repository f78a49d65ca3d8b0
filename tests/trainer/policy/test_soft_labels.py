"""Confidence as the probability that a label is right."""

import math

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from cwpo.errors import ConfigError, DatasetError
from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer, soft_labels
from cwpo_trainer.commands import Align
from cwpo_trainer.run.folder import read_lines, read_record
from cwpo_trainer.soft_labels import SOFT_LABELS

from ..samples import weighted, write_lines
from .test_confidence_dpo import (
    assert_same_gradient,
    batch_of,
    build,
    dataset,
    gradients,
    options,
)


def test_the_label_is_wrong_as_often_as_the_scores_say():
    margins = torch.tensor([0.0, 0.5, 2.0, 9.0], dtype=torch.float64)
    found = soft_labels.epsilons(torch.tanh(margins / 2), most=0.5)
    assert found == pytest.approx(torch.sigmoid(-margins).numpy(), abs=1e-7)
    assert soft_labels.epsilons([0.0, 0.08, 0.2], most=0.45) == pytest.approx([0.45, 0.45, 0.4])


@pytest.mark.parametrize("loss", ["cdpo", "robust"])
def test_each_pair_mixes_trls_losses_by_its_own_epsilon(
    loss, tiny_causal, tiny_tokenizer, tmp_path
):
    epsilons = [0.05, 0.4, 0.0]
    models = (tmp_path, tiny_causal, tiny_tokenizer)
    data = dataset([1.0] * 3, wrong=epsilons)
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    expected, means = 0.0, {}
    for at, epsilon in enumerate(epsilons):
        scale = 3 if loss == "cdpo" else 3 * (1 - 2 * epsilon)
        sign = 1 if loss == "cdpo" else -1
        for pairs, share in ((data, 1 - epsilon), (swapped, sign * epsilon)):
            config = DPOConfig(**options(tmp_path, loss_type="sigmoid"))
            trainer = build(DPOTrainer, config, *models, pairs.select([at]))
            value, gradient = gradients(trainer, batch_of(trainer))
            expected += share / scale * value.item()
            for name, tensor in gradient.items():
                means[name] = means.get(name, 0) + share / scale * tensor
    config = ConfidenceDPOConfig(**options(tmp_path, loss_type=loss), epsilon_column="wrong")
    trainer = build(ConfidenceDPOTrainer, config, *models, data)
    value, gradient = gradients(trainer, batch_of(trainer))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert_same_gradient(gradient, means)


@pytest.mark.parametrize("use", SOFT_LABELS)
def test_align_reads_confidence_as_a_soft_label(use, tiny_causal, tmp_path, command, capsys):
    rows = weighted(8)
    data = write_lines(tmp_path / "weighted.jsonl", rows)
    output = tmp_path / "out"
    command(
        Align,
        *("--model", tiny_causal, "--data", data, "--output", output, "--confidence-as", use),
        *("--batch-size", 8, "--gradient-accumulation", 1, "--learning-rate", 1e-2),
        *("--max-steps", 2, "--epochs", 2, "--dtype", "float32"),
    )
    soft = SOFT_LABELS[use]
    settings = read_record(output).settings
    assert (settings["loss"], settings["weight"]) == (soft.loss, "none")
    first, second = read_lines(output / "training.jsonl")
    assert (first["weight"], second["weight"]) == (1, 1)
    # At the start h is 0: both losses are log 2 for any epsilon.
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert second["loss"] < first["loss"]
    assert f"{soft.loss}, confidence as {use}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loss", "ipo"), "ipo takes no confidence but as a weight"),
        (("--loss", "rdpo"), "makes --loss cdpo of dpo; rdpo takes no confidence"),
        (("--loss", "cdpo", "--epsilon", 0.2), "--epsilon has no effect"),
        (("--weight", "rank"), "--weight rank: --confidence-as soft_label is set"),
        (("--labels", "human"), "human labels have none"),
    ],
)
def test_what_contradicts_soft_labels_is_refused(flags, message, failure):
    common = ("--model", "m", "--data", "d", "--output", "o", "--confidence-as", "soft_label")
    assert message in failure(Align, *common, *flags)


def test_a_trainer_refuses_a_column_that_is_none_of_epsilons(tiny_causal, tiny_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="epsilon_column: sigmoid has no epsilon"):
        ConfidenceDPOConfig(**options(tmp_path), epsilon_column="wrong")
    with pytest.raises(ConfigError, match="give one of them"):
        ConfidenceDPOConfig(
            **options(tmp_path, loss_type="cdpo"), label_smoothing=0.1, epsilon_column="wrong"
        )
    for loss, of_third, message in (
        ("cdpo", None, "no column 'wrong'"),
        ("cdpo", 0.6, "pair 3 of the train dataset has the epsilon 0.6"),
        ("robust", 0.5, "pair 3 of the train dataset has the epsilon 0.5"),
        ("robust", math.nan, "pair 3 of the train dataset has the epsilon nan"),
    ):
        config = ConfidenceDPOConfig(**options(tmp_path, loss_type=loss), epsilon_column="wrong")
        columns = {} if of_third is None else {"wrong": [0.1, 0.2, of_third]}
        with pytest.raises(DatasetError, match=message):
            build(
                ConfidenceDPOTrainer,
                config,
                *(tmp_path, tiny_causal, tiny_tokenizer),
                dataset([1.0] * 3, **columns),
            )
