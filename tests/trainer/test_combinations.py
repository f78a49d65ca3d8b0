"""Each way to train that docs/cluster.md calls tested does what the plainest one does."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from cwpo import cli
from cwpo_trainer.commands import Align, Sft, TrainAnnotator

from .combinations import ANNOTATORS_ONE, ANNOTATORS_TWO, ONE, TWO
from .launching import (
    assert_annotators_alike,
    assert_policies_alike,
    in_two_processes,
    said,
)
from .samples import pairs, weighted, write_lines

pytestmark = pytest.mark.slow

KINDS = {"align": Align, "sft": Sft, "train-annotator": TrainAnnotator}


def trainable(combinations):
    """Those for which there is all that they need, each as a parameter."""
    without = () if find_spec("bitsandbytes") else ("QLoRA",)
    return [each for each in combinations if each.weights not in without]


@pytest.fixture(scope="module")
def common(small_causal, tmp_path_factory):
    """Flags of three steps on 24 pairs."""
    data = write_lines(tmp_path_factory.mktemp("data") / "weighted.jsonl", weighted(24))
    return (
        *("--model", small_causal, "--data", data, "--gradient-accumulation", 1),
        *("--epochs", 1, "--learning-rate", 1e-3, "--dtype", "float32", "--threads", 1),
    )


@pytest.fixture(scope="module")
def of_annotators(tiny_causal, tmp_path_factory):
    """Flags of three steps on 24 pairs, of all processes together."""
    data = write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(40))
    return (
        *("--model", tiny_causal, "--data", data, "--max-length", 64, "--learning-rate", 1e-3),
        *("--dtype", "float32", "--threads", 1, "--max-steps", 3, "--batch-size", 8),
    )


@pytest.fixture(scope="module")
def one(common, of_annotators, tmp_path_factory):
    """Gives the folder of a run in one process, made when it is first asked for."""
    root, runs = tmp_path_factory.mktemp("one"), {}

    def run(combination, *more):
        key = (combination._replace(processes="one"), *more)
        if key not in runs:
            runs[key] = root / str(len(runs))
            is_annotator = combination.command == "train-annotator"
            flags = of_annotators if is_annotator else (*common, "--batch-size", 8)
            flags = (*flags, *key[0].flags, *more, "--output", runs[key])
            cli.run(KINDS[combination.command], [*map(str, flags)], "cwpo")
        return runs[key]

    return run


@pytest.mark.parametrize("combination", trainable(ONE), ids=str)
def test_one_process_follows_texts_that_are_read_by_themselves(combination, one, capsys):
    packed = one(combination)
    assert "read by itself" not in capsys.readouterr().err
    on_the_fly = "none" if combination.reference == "none" else "on the fly"
    plain = one(combination._replace(reference=on_the_fly), "--no-share-prompts")
    assert_policies_alike(packed, plain)


@pytest.fixture(scope="module")
def two(common, tmp_path_factory):
    """The folder with the runs of two processes, by the names of the combinations."""
    root = tmp_path_factory.mktemp("two")
    runs = {
        str(each): (each.command, (*common, *each.flags, "--batch-size", 4), None)
        for each in trainable(TWO)
    }
    in_two_processes(root, runs)
    return root


@pytest.mark.parametrize("combination", trainable(TWO), ids=str)
def test_two_processes_follow_one(combination, one, two):
    texts = said(two, str(combination))
    assert all(text.endswith("exit code 0\n") for text in texts), texts
    assert "read by itself" not in "".join(texts)
    # Without FSDP2 a run would give the same.
    assert ("gathered its shares" in texts[0]) == (combination.processes == "FSDP2")
    assert "TRL loads a reference" not in "".join(texts)
    assert_policies_alike(one(combination), two / str(combination))


@pytest.mark.parametrize("combination", ANNOTATORS_ONE, ids=str)
def test_one_process_makes_the_annotator_of_pairs_that_are_read_by_themselves(combination, one):
    assert_annotators_alike(one(combination), one(combination, "--token-budget", 1))


@pytest.fixture(scope="module")
def two_annotators(of_annotators, tmp_path_factory):
    """As `two`."""
    root = tmp_path_factory.mktemp("two-annotators")
    runs = {
        str(each): (each.command, (*of_annotators, *each.flags), None) for each in ANNOTATORS_TWO
    }
    in_two_processes(root, runs)
    return root


@pytest.mark.parametrize("combination", ANNOTATORS_TWO, ids=str)
def test_two_processes_make_the_annotator_of_one(combination, one, two_annotators):
    texts = said(two_annotators, str(combination))
    assert all(text.endswith("exit code 0\n") for text in texts), texts
    assert_annotators_alike(one(combination), two_annotators / str(combination))
