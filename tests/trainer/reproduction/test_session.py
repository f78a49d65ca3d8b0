"""Recipes run on tiny models, interrupted, and shown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from cwpo.errors import ConfigError
from cwpo_trainer.commands import Reproduce
from cwpo_trainer.reproduction import published
from cwpo_trainer.reproduction.layout import average, notes, table_of
from cwpo_trainer.reproduction.policy_recipes import Pairing, Setting, run_on
from cwpo_trainer.reproduction.recipe import Recipe, Row
from cwpo_trainer.reproduction.results import Measured, Results, RowResult, read_results
from cwpo_trainer.reproduction.scale import small
from cwpo_trainer.reproduction.session import run_rows
from cwpo_trainer.run.folder import last_checkpoint, read_record
from cwpo_trainer.settings.reproduction import Reproduction

from ..samples import pairs, write_lines


@pytest.fixture
def place(tiny_causal, tmp_path):
    """Folders as `--scale small` expects them, with tiny models in the place of the small ones."""
    for name in ("minilm", "smollm2"):
        shutil.copytree(tiny_causal, tmp_path / "models" / name)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "hh_harmless.jsonl", pairs(80))
    return tmp_path


def flags(place):
    return (
        *("--data", place / "data", "--models", place / "models"),
        *("--output", place / "out", "--seeds", 1, "--threads", 1),
    )


def measured(place, name):
    path = place / "out" / f"{name}-small" / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {row["column"]: row["measured"] for row in rows if row["measured"]}


def made(place):
    """When each finished step was made."""
    folder = place / "out" / "steps"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[a-z]*[0-9a-f]")}


@pytest.mark.slow
def test_a_killed_recipe_goes_on_with_the_next_row(place, failure, capsys):
    # The tiny model has two layers, of the four columns' 1, 2, 4 and 6.
    words = [str(word) for word in ("reproduce", "table-12", *flags(place))]
    running = subprocess.Popen([sys.executable, "-m", "cwpo", *words], start_new_session=True)
    while not measured(place, "table-12"):
        assert running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before, first = made(place), measured(place, "table-12")["0.5B"]
    assert "2 rows have failed" in failure(Reproduce, "table-12", *flags(place))
    found = measured(place, "table-12")
    assert found.keys() == {"0.5B", "1.5B"}
    assert found["0.5B"] == first
    after = made(place)
    assert {name: after[name] for name in before} == before
    rows = read_results(place / "out" / "table-12-small").rows
    why = {row.column: row.failed for row in rows if row.failed}
    assert why.keys() == {"3B", "7B"}
    assert "layers" in why["3B"][0]
    # What is there is not made again, even if only the figures are.
    shutil.rmtree(place / "out" / "steps" / first[0]["made_by"][0])
    failure(Reproduce, "table-12", *flags(place))
    assert measured(place, "table-12") == found
    assert not (place / "out" / "steps" / first[0]["made_by"][0]).exists()
    out = capsys.readouterr().out
    assert "63.5" in out  # The paper's figure of 0.5B.
    assert (place / "out" / "table-12-small" / "table.txt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_commands_that_run_save_their_checkpoints_first(place, parallel):
    write_lines(place / "data" / "hh_harmless.jsonl", pairs(4000))
    words = ("reproduce", "table-12", *flags(place), "--parallel", parallel)
    command = [sys.executable, "-m", "cwpo", *map(str, words)]
    running = subprocess.Popen(command, start_new_session=True)
    steps = place / "out" / "steps"
    while len([*steps.glob(".*.partial/training.jsonl")]) < parallel:
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait() == 128 + signal.SIGTERM
    partial = [*steps.glob(".*.partial")]
    assert len(partial) == parallel
    assert all(last_checkpoint(each) is not None for each in partial)


@pytest.mark.slow
def test_commands_side_by_side_give_what_they_give_alone(place, failure):
    write_lines(place / "data" / "hh_harmless.jsonl", pairs(60))
    found = []
    for parallel in (1, 2):
        words = (*flags(place), "--output", place / f"out{parallel}", "--parallel", parallel)
        # The tiny model has two layers, of the four columns' 1, 2, 4 and 6.
        assert "2 rows have failed" in failure(Reproduce, "table-12", *words)
        rows = read_results(place / f"out{parallel}" / "table-12-small").rows
        found.append([row.measured for row in rows if row.measured])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_commands_of_the_papers_scale_do_not_share_its_gpus(failure, place):
    words = (*flags(place), "--scale", "paper", "--parallel", 2)
    assert "--parallel is for --scale small" in failure(Reproduce, "table-12", *words)


@pytest.mark.slow
def test_a_policy_from_labels_to_its_figure(place, capsys):
    settings = Reproduction(
        name="table-3",
        data=place / "data",
        models=place / "models",
        output=place / "out",
        seeds=1,
    )
    few = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2}
    at = small(settings)
    scale = replace(
        at,
        annotator=at.annotator | {"epochs": 1},
        sft=at.sft | few,
        align=at.align | few,
        evaluation={"prompts": 4, "max_new_tokens": 4},
    )
    reads = run_on(scale, Pairing.of(published.OPT_1_3B), "Harmless", Setting.cw)
    row = Row((published.OPT_1_3B, "Harmless"), "CW-DPO", reads, paper=72.9)
    recipe = Recipe("tiny", "A tiny table", "GRA, %", lambda _: [row], drawing="bars")
    run_rows(recipe, [row], settings)
    folder = place / "out" / "tiny-small"
    (one,) = read_results(folder).rows[0].measured
    (reading,) = reads(0)
    record = read_record(reading.step.path(place / "out" / "steps"))
    (policy,) = record.results["policies"].values()
    assert one.value == 100 * policy["win_share"]
    assert one.low <= one.value <= one.high
    assert record.results["prompts"] == 4
    # What the reference model made of the pairs is there for the next policy.
    assert any((place / "out" / "steps" / "references").iterdir())
    out = capsys.readouterr().out
    assert "72.9" in out
    assert "<svg" in (folder / "figure.svg").read_text()


def test_results_are_shown_where_there_are_neither_data_nor_models(
    tmp_path, command, failure, capsys, monkeypatch
):
    monkeypatch.delenv("CWPO_DATA_DIR", raising=False)
    show = ("table-12", "--output", tmp_path, "--models", tmp_path / "none", "--show")
    assert "holds no results" in failure(Reproduce, *show)
    measured = [
        Measured(seed=0, value=61.25, low=58.0, high=64.5, spread=None, made_by=["a-0"]),
        Measured(seed=1, value=62.75, low=59.0, high=65.5, spread=None, made_by=["a-1"]),
    ]
    row = RowResult(line=("", "Harmlessness"), column="3B", paper=65.0, measured=measured)
    folder = tmp_path / "table-12-small"
    folder.mkdir()
    what = {"recipe": "table-12", "title": "Size", "measure": "%", "scale": "small"}
    Results(**what, rows=[row]).write(folder)
    command(Reproduce, *show)
    out = capsys.readouterr().out
    assert "62.0 ± 1.1" in out
    assert "[58.5, 65.0]" in out
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_a_dry_run_prints_commands_and_runs_none(place, command, capsys):
    command(Reproduce, "table-12", *flags(place), "--dry-run")
    out = capsys.readouterr().out
    assert out.count("cwpo data split") == 1
    assert out.count("cwpo train-annotator") == 4
    assert out.count("cwpo evaluate annotator") == 4
    assert not (place / "out").exists()


def test_the_papers_scale_names_what_it_needs(command, capsys, tmp_path):
    command(Reproduce, "table-12", "--scale", "paper", "--data", tmp_path, "--dry-run")
    out = capsys.readouterr().out
    assert "# models: Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B" in out
    assert "Anthropic/hh-rlhf/harmless-base" in out
    assert "# GPUs with 80 GB: 1, 8 where torchrun is used" in out
    assert (
        "torchrun --nproc-per-node 8 --shutdown-timeout 600 -m cwpo_trainer.train_annotator" in out
    )


def test_the_list_has_every_recipe_with_its_time(command, capsys, place):
    command(Reproduce, "--list", *flags(place))
    out = capsys.readouterr().out
    assert "table-1 " in out
    assert "controlled-world" in out


def test_recipes_are_listed_without_data(command, capsys, monkeypatch):
    monkeypatch.delenv("CWPO_DATA_DIR", raising=False)
    command(Reproduce, "--list")
    (contest,) = (line for line in capsys.readouterr().out.splitlines() if "contest" in line)
    assert "22 of 24" in contest


def test_what_cannot_be_run_is_refused(place, failure, tmp_path):
    assert "name a recipe, or see all with --list" in failure(Reproduce)
    assert "no recipe 'table-7'; there are table-1, " in failure(
        Reproduce, "table-7", *flags(place)
    )
    nowhere = failure(Reproduce, "table-12", "--data", place / "data", "--models", tmp_path / "x")
    assert "examples/models.py" in nowhere
    missing = failure(Reproduce, "table-12", *flags(place)[2:], "--data", tmp_path / "nothing")
    assert "--data has no hh_harmless" in missing


def test_settings_that_a_command_refuses_are_found_before_anything_runs(place):
    from cwpo_trainer.reproduction.step import Step

    step = Step("align", "policy", {"model": "m", "data": "d", "loss": "ipo", "beta": 0.1, "x": 1})
    with pytest.raises(ConfigError, match=r"policy-[0-9a-f]{8}: align: x Extra inputs"):
        step.parsed(place)


def one_seed(seed, value, low=None, high=None, spread=None):
    return Measured(seed=seed, value=value, low=low, high=high, spread=spread, made_by=["x"])


def test_the_table_has_means_deviations_and_intervals():
    first = RowResult(
        line=("block", "one"),
        column="CW-DPO",
        paper=60.0,
        measured=[
            one_seed(0, 60, 50, 70, 2),
            one_seed(1, 62, 52, 72, 4),
            one_seed(2, 64, 54, 74, 6),
        ],
    )
    second = RowResult(
        line=("block", "two"), column="CW-DPO", paper=50.0, measured=[one_seed(0, 40)]
    )
    other = RowResult(line=("block", "two"), column="Human", paper=None, missing="no data")
    assert (first.mean, first.deviation, first.spread) == (62, 2, 4)
    assert first.interval == (52, 72)
    assert (second.deviation, second.interval) == (None, None)
    assert average([first, second]) == (55, 51)
    assert average([first, other]) == (None, None)
    results = Results(
        recipe="r", title="t", measure="m", scale="small", rows=[first, second, other]
    )
    table = table_of(results, averages=True, spread_of_thirds=False)
    cells = [[*column.cells] for column in table.columns]
    assert cells[1] == ["one", "two", "Avg."]
    assert cells[2] == ["60.0\n62.0 ± 2.0\n[dim]\\[52.0, 72.0][/]", "50.0\n40.0", "55.0\n51.0"]
    thirds = table_of(results, averages=False, spread_of_thirds=True)
    assert next(iter(thirds.columns[2].cells)).startswith("60.0\n62.0 ± 4.0")
    assert "–: 1 of 3 rows are not run: no data" in [*notes(results)]
