"""Every recipe, at both scales: its commands are ones that the command line takes."""

from __future__ import annotations

import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from cwpo.commands.annotate import Annotate
from cwpo_trainer import commands
from cwpo_trainer.reproduction.catalogue import RECIPES
from cwpo_trainer.reproduction.scale import (
    PAPER_ALIGN,
    PAPER_ANNOTATOR,
    PAPER_SFT,
    paper,
    small,
)
from cwpo_trainer.reproduction.step import in_order
from cwpo_trainer.run.folder import RunRecord
from cwpo_trainer.settings.reproduction import Reproduction

from ..samples import pairs, write_lines

RECIPE_FILES = Path(__file__).parents[3] / "trainer" / "recipes" / "paper"
COMMANDS = {
    "data split": commands.SplitData,
    "data poison": commands.PoisonData,
    "data mix": commands.MixData,
    "data draw": commands.DrawData,
    "train-annotator": commands.TrainAnnotator,
    "annotate": Annotate,
    "sft": commands.Sft,
    "align": commands.Align,
    "online": commands.Online,
    "evaluate annotator": commands.EvaluateAnnotator,
    "evaluate policy": commands.EvaluatePolicy,
}
# The tables and figures with figures of models: others are texts, settings and drawings.
OF_THE_PAPER = {
    *(f"table-{number}" for number in (1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 16, 17, *range(20, 27))),
    *(f"figure-{name}" for name in ("2", "3-left", "3-right", "4", "5", "7", "8")),
}
# What a scale cannot run at all, since it has no such model.
NOT_RUN = {"small": {"table-11", "table-23"}, "paper": set()}
FILES = ("hh_harmless", "qa_feedback", "ultrafeedback_1k")
DOMAINS = ("askacademia", "askbaking", "askengineers", "askphilosophy")


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    # Each with rows of its own: a file is known by its content.
    for at, name in enumerate((*FILES, *DOMAINS, *(f"{domain}_test" for domain in DOMAINS))):
        write_lines(folder / f"{name}.jsonl", pairs(2 + at))
    judge = {"llm_judge": "http://127.0.0.1:1/v1", "llm_judge_model": "judge"}
    settings = Reproduction(name="table-1", data=folder, **judge)
    return {"small": small(settings), "paper": paper(settings)}


def steps_of(recipe, scale, seeds=1):
    return in_order(
        [
            reading.step
            for seed in range(seeds)
            for row in recipe.rows(scale)
            if row.readings is not None
            for reading in row.readings(seed)
        ]
    )


def test_every_table_and_figure_has_a_recipe():
    papers = {name for name, recipe in RECIPES.items() if recipe.is_the_papers}
    assert papers == OF_THE_PAPER
    assert {"contest", "controlled-world"} <= RECIPES.keys() - papers


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_command_has_settings_that_it_takes(name, scale, scales, tmp_path):
    steps = steps_of(RECIPES[name], scales[scale])
    assert bool(steps) == (name not in NOT_RUN[scale])
    for step in steps:
        step.parsed(tmp_path)
        step.path(tmp_path).mkdir()


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_command_is_one_that_the_command_line_takes(scale, scales, tmp_path):
    """One of each set of flags: to read a command line takes long."""
    for step in {
        (step.command, *step.settings, step.settings.get("objective")): step
        for recipe in RECIPES.values()
        for step in steps_of(recipe, scales[scale])
    }.values():
        for each in (step, *step.inputs):
            each.path(tmp_path).mkdir(exist_ok=True)
        parsed = step.parsed(tmp_path)
        words = step.words(tmp_path)
        read = as_typed(COMMANDS[step.command], words[len(step.command.split()) :])
        given = {name: getattr(read, name) for name in parsed.model_fields_set}
        assert given == {name: getattr(parsed, name) for name in parsed.model_fields_set}


def as_typed(command, words):
    """The settings that a command reads from these words."""
    from pydantic_settings import CliApp

    class Typed(command):
        """Reads flags.

        Example:
            cwpo typed
        """

        def cli_cmd(self):
            pass

    return CliApp.run(Typed, cli_args=words)


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_steps_of_one_name_are_one_command(scale, scales, tmp_path):
    found = {}
    for recipe in RECIPES.values():
        for step in steps_of(recipe, scales[scale], seeds=2):
            words = [word for word in step.words(tmp_path) if word != str(tmp_path)]
            assert found.setdefault(step.name, words) == words


def test_recipes_share_what_they_have_in_common(scales):
    names = {
        name: {step.name for step in steps_of(RECIPES[name], scales["paper"])}
        for name in ("table-1", "table-20", "table-4", "table-10", "figure-2")
    }
    assert names["table-1"] == names["table-20"]
    assert names["table-10"] < names["figure-2"]
    policies = {step for step in names["table-4"] & names["table-10"] if step.startswith("cw-")}
    assert len(policies) == 3  # Top 30 % on three data sets.


def test_seeds_share_nothing_that_is_drawn(scales):
    of_seed = [
        {
            step.name
            for row in RECIPES["table-3"].rows(scales["small"])
            if row.readings is not None
            for step in in_order([reading.step for reading in row.readings(seed)])
        }
        for seed in (0, 1)
    ]
    assert not of_seed[0] & of_seed[1]


def test_the_papers_settings_are_those_of_the_recipe_files():
    for name, settings in (
        ("annotator", PAPER_ANNOTATOR),
        ("sft", PAPER_SFT),
        ("align", PAPER_ALIGN),
    ):
        in_file = yaml.safe_load((RECIPE_FILES / f"{name}.yaml").read_text())
        # Of the data and of the split; what a row says itself; what is a default anyway.
        own = {"max_length", "labelled_fraction", "held_out_fraction", "loss", "weight"}
        in_file = {key: in_file[key] for key in in_file.keys() - own - {"normalise"}}
        if name == "annotator":
            assert in_file.pop("lora") is False
        assert {key: settings[key] for key in settings if key != "adapter_only"} == in_file


def test_policies_are_judged_by_labels_that_the_annotator_has_not_seen(scales):
    """At the small scale the judge is trained on a part of its own."""
    steps = steps_of(RECIPES["contest"], scales["small"])
    judge = next(step for step in steps if step.label == "judge")
    weak = next(step for step in steps if step.label == "annotator-bt")
    first = judge.settings["data"].step
    assert judge.settings["data"].file == "labelled.jsonl"
    # The annotator's labels are of the unlabelled part of the split that the judge's are of.
    assert weak.settings["data"].step.settings["data"].step is first or (
        weak.settings["data"].step.settings["data"].step.name == first.name
    )
    assert weak.settings["data"].step.settings["data"].file == "unlabelled.jsonl"
    evaluation = next(step for step in steps if step.command == "evaluate policy")
    assert evaluation.settings["data"].file == "held_out.jsonl"
    assert evaluation.settings["data"].step.name == first.name


def test_every_use_of_the_confidence_has_the_same_labels_start_and_steps(scales):
    policies = [
        step for step in steps_of(RECIPES["contest"], scales["small"]) if step.command == "align"
    ]
    assert len(policies) == 6
    assert len({step.settings["model"].step.name for step in policies}) == 1
    assert len({step.settings["max_steps"] for step in policies}) == 1
    uses = [(step.settings.get("weight"), step.settings.get("confidence_as")) for step in policies]
    assert len(set(uses)) == 6
    triplets = {step.settings["data"].step.settings["input"].step.name for step in policies}
    assert len(triplets) == 1


def test_answers_without_a_score_are_a_share_of_all(scales):
    row = next(
        row
        for row in RECIPES["contest"].rows(scales["small"])
        if row.name.endswith("answers without a score / weight")
    )
    (reading,) = row.readings(0)
    (name,) = (
        policy.step.name
        for policy in reading.step.settings["policy"]
        if policy.step.label == "weight"
    )
    results = {"prompts": 8, "policies": {name: {"scored": 6}}}
    record = RunRecord(
        kind="evaluate-policy", settings={}, results=results, seconds=1, started_at=datetime.now()
    )
    assert reading.read(record).value == 25


def test_policies_of_one_start_are_evaluated_together(scales):
    """The SFT model then answers once for all of them."""

    def evaluated(name):
        return sorted(
            len(step.settings["policy"])
            for step in steps_of(RECIPES[name], scales["small"])
            if step.command == "evaluate policy"
        )

    # The filter by certificate apart: it fails alone where labels are too few for one.
    assert evaluated("contest") == [1, 5]
    # On two data sets three losses each, by people, by WS-DPO's annotator and by CW-PO's.
    assert evaluated("table-1") == [3] * 6
    # At two noises and three shares: by people, and by the annotator with and without weights.
    assert evaluated("controlled-world") == [1] * 6 + [2] * 6


def test_the_list_says_how_long_each_takes(scales):
    recipe = RECIPES["table-13"]
    one, three = (recipe.minutes(scales["small"], seeds) for seeds in (1, 3))
    # 15 rows: a training and a measurement each.
    assert one == 15 * (
        scales["small"].minutes["train-annotator"] + scales["small"].minutes["evaluate annotator"]
    )
    assert three == 3 * one
    assert recipe.minutes(scales["paper"], 3) is None


def test_steps_are_known_by_what_files_hold_wherever_these_lie(
    tmp_path, tiny_causal, tiny_annotator
):
    """So that figures of one machine are those of another."""

    def names(folder, rows, minilm=tiny_annotator):
        for name, model in (("minilm", minilm), ("smollm2", tiny_causal)):
            shutil.copytree(model, folder / "models" / name)
        write_lines(folder / "hh_harmless.jsonl", pairs(rows))
        settings = Reproduction(name="contest", data=folder, models=folder / "models")
        return {step.name for step in steps_of(RECIPES["contest"], small(settings))}

    here = names(tmp_path / "here", rows=2)
    assert names(tmp_path / "there", rows=2) == here
    assert not names(tmp_path / "other data", rows=3) & here
    other_model = names(tmp_path / "other model", rows=2, minilm=tiny_causal)
    # Pairs are split without a model.
    common = {name.rpartition("-")[0] for name in other_model & here}
    assert "judge-parts" in common
    assert common <= {"judge-parts", "parts", "apart", "everything"}


def test_names_of_steps_are_names_of_files(scales):
    for scale in scales.values():
        for recipe in RECIPES.values():
            for step in steps_of(recipe, scale):
                assert re.fullmatch(r"[\w.-]+", step.name), step.name
