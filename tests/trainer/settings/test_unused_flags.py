"""A flag that the choices of a run leave without effect is refused, with the one that has it."""

from __future__ import annotations

import pytest

from cwpo_trainer.commands import Align, Sft, TrainAnnotator
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import weighted, write_lines

FILES = ("--model", "unread", "--data", "unread.jsonl", "--output", "unwritten")


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        (Align, ("--tau", 0.1), "--tau belongs to --loss ipo; dpo takes --beta"),
        (
            Align,
            ("--loss", "orpo", "--gamma", 1),
            "--gamma belongs to --loss simpo; orpo takes --beta",
        ),
        (
            Align,
            ("--loss", "ipo", "--epsilon", 0.1),
            "--epsilon belongs to --loss rdpo or cdpo; ipo takes --tau and --ipo-length-normalised",
        ),
        (Align, ("--no-ipo-length-normalised",), "--ipo-length-normalised belongs to --loss ipo"),
        (
            Align,
            ("--loss", "ipo", "--beta", 0.1, "--tau", 0.2),
            "--beta is another name of --tau for --loss ipo: give one of them",
        ),
        (
            Align,
            ("--exponent", 3),
            "--exponent belongs to --weight power; confidence takes no constant",
        ),
        (
            Align,
            ("--weight", "power", "--top-percent", 3),
            "--top-percent belongs to --weight top; power takes --exponent",
        ),
        (Align, ("--weight", "top", "--normalise"), "--weight top only selects pairs"),
        (Align, ("--weight", "none", "--calibrated"), "--weight none reads no confidence"),
        (Align, ("--labels", "human", "--normalise"), "leave --normalise out"),
        (Align, ("--labels", "human", "--weight-by", "prompt"), "leave --weight-by out"),
        (Align, ("--lora-rank", 4), "--lora-rank needs --lora"),
        (Sft, ("--lora-dropout", 0.1), "--lora-dropout needs --lora"),
        (TrainAnnotator, ("--lora-alpha", 4), "--lora-alpha needs --lora"),
        (
            TrainAnnotator,
            ("--beta", 0.1),
            "--beta belongs to --objective dpo or sft+dpo; bt has none",
        ),
        (
            TrainAnnotator,
            ("--objective", "dpo", "--sft-epochs", 2),
            "--sft-epochs belongs to --objective sft+dpo; dpo has none",
        ),
        (
            TrainAnnotator,
            ("--objective", "pairrm", "--margin", 1),
            "--margin belongs to --objective bt; pairrm has none",
        ),
        (
            TrainAnnotator,
            ("--validation-fraction", 0, "--patience", 2),
            "--patience has nothing to validate on",
        ),
    ],
)
def test_a_flag_without_effect_is_refused(kind, flags, message, failure):
    assert message in failure(kind, *FILES, *flags)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tau: 0.1", "--tau belongs to --loss ipo"),
        ("top_percent: 10", "--top-percent belongs to --weight top"),
        ("lora_rank: 8", "--lora-rank needs --lora"),
        ("lora_dropout: 0.1", "no setting is called lora_dropout"),
    ],
)
def test_a_file_of_settings_is_held_to_the_same(line, message, tmp_path, failure):
    (tmp_path / "align.yaml").write_text(line + "\n")
    assert message in failure(Align, *FILES, "--config", tmp_path / "align.yaml")


@pytest.mark.parametrize(
    "flags", [("--beta", 0.1), ("--tau", 0.1), ("--tau", 0.1, "--beta", 0.1)], ids=str
)
def test_beta_is_the_tau_of_ipo(flags, tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(4))
    files = ("--model", tiny_causal, "--data", data, "--output", tmp_path / "out")
    small = ("--max-steps", 1, "--dtype", "float32", "--threads", 1)
    command(Align, *files, *small, "--loss", "ipo", *flags)
    assert read_record(tmp_path / "out").settings["tau"] == 0.1
    (line,) = read_lines(tmp_path / "out" / "training.jsonl")
    # Policy and reference being the same, h is 0.
    assert line["unweighted_loss"] == pytest.approx((1 / (2 * 0.1)) ** 2, rel=1e-4)
