from __future__ import annotations

from cwpo_trainer.commands import Evaluate
from cwpo_trainer.run.folder import read_record

from ..samples import pairs, write_lines


def test_the_figures_cover_every_pair(tiny_annotator, tmp_path, command, capsys):
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(40))
    flags = ("--annotator", tiny_annotator, "--data", held_out, "--output", tmp_path / "accuracy")
    command(Evaluate, "annotator", *flags)
    assert "on 40 pairs" in capsys.readouterr().out
    results = read_record(tmp_path / "accuracy").results
    assert sum(item["pairs"] for item in results["bins"]) == 40


def test_pairs_that_do_not_fit_are_summed_up(tiny_annotator, tmp_path, command, capsys):
    rows = pairs(5)
    rows[3]["response_a"] = "the day " * 1000
    held_out = write_lines(tmp_path / "held_out.jsonl", rows)
    flags = ("--annotator", tiny_annotator, "--data", held_out, "--output", tmp_path / "accuracy")
    command(Evaluate, "annotator", *flags)
    assert "1 of 5 pairs left out: 1 response_too_long. The model reads at most" in (
        capsys.readouterr().err
    )
    results = read_record(tmp_path / "accuracy").results
    assert (results["pairs"], results["failed"]) == (4, 1)
