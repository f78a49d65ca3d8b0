"""`cwpo data`, on rows few enough to check by hand."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest

from cwpo_trainer.commands import Data
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.data.labelled_file import read_provenance
from cwpo_trainer.data.preparation import (
    drawn,
    probability_against,
    shares_of,
    temperature_for,
)

from ..samples import pairs, weighted, write_lines


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", pairs(20))


def test_poison_flips_exactly_the_share(data, tmp_path, command, capsys):
    command(Data, "poison", data, "--share", 0.25, "-o", tmp_path / "poisoned.jsonl")
    rows = rows_in(tmp_path / "poisoned.jsonl")
    for before, after in zip(pairs(20), rows, strict=True):
        assert {**before, "preferred": after["preferred"], "flipped": after["flipped"]} == after
        assert (after["preferred"] != before["preferred"]) == after["flipped"]
    assert sum(row["flipped"] for row in rows) == 5
    assert "20 pairs, the labels of 5 of them flipped" in capsys.readouterr().out


def test_json_is_alone_on_standard_output_and_not_in_the_provenance(
    data, tmp_path, command, capsys
):
    def said(*arguments):
        command(Data, *arguments, "--json")
        return json.loads(capsys.readouterr().out)

    path = tmp_path / "poisoned.parquet"
    figures = {"pairs": 20, "flipped": 5}
    assert said("poison", data, "--share", 0.25, "-o", path) == {"output": str(path), **figures}
    provenance = read_provenance(path)
    assert provenance | figures == provenance
    assert "json_" not in provenance
    splits = tmp_path / "splits"
    parts = said(
        "split", data, "--labelled-fraction", 0.5, "--held-out-fraction", 0.2, "-o", splits
    )
    assert parts == {
        "output": str(splits),
        **{part: len(rows_in(splits / f"{part}.jsonl")) for part in list(parts)[1:]},
    }
    assert list(parts)[1:] == ["labelled", "unlabelled", "held_out"]


def test_poison_follows_its_seed(data, tmp_path, command):
    def flipped(seed):
        path = tmp_path / f"{random.random()}.jsonl"
        command(Data, "poison", data, "--share", 0.25, "--seed", seed, "-o", path)
        return [row["id"] for row in rows_in(path) if row["flipped"]]

    assert flipped(1) == flipped(1) != flipped(2)


def test_poison_of_the_surest_labels(tmp_path, command):
    confidences = [0.1, 0.9, 0.2, 0.8, 0.5]
    rows = [
        row | {"confidence": value} for row, value in zip(weighted(5), confidences, strict=True)
    ]
    data = write_lines(tmp_path / "weighted.jsonl", rows)
    out = tmp_path / "poisoned.jsonl"
    command(Data, "poison", data, "--share", 0.4, "--surest", "--only-flipped", "-o", out)
    poisoned = read_pairs(str(out))
    assert [pair.id for pair in poisoned] == ["1", "3"]
    assert [pair.chosen for pair in poisoned] == [rows[1]["rejected"], rows[3]["rejected"]]


def test_poison_refuses_to_change_nothing(data, tmp_path, failure):
    out = tmp_path / "poisoned.jsonl"
    assert "a share of 0.01 of 20 labels is none" in failure(
        Data, "poison", data, "--share", 0.01, "-o", out
    )
    assert not out.exists()


def test_every_pair_is_as_likely_to_be_drawn():
    counts = Counter()
    for seed in range(3000):
        chosen = [at for at, one in enumerate(drawn(2, 5, random.Random(seed))) if one]
        assert len(chosen) == 2
        counts[tuple(chosen)] += 1
    # Each of the ten couples 300 times; the standard deviation is 16.4.
    assert len(counts) == 10
    assert all(abs(count - 300) < 70 for count in counts.values())


def test_shares_are_rounded_by_largest_remainders():
    sizes = {"a": 100, "b": 100, "c": 100}
    thirds = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert shares_of(thirds, sizes, 11) == {"a": 6, "b": 3, "c": 2}  # 5.5, 3.3, 2.2
    assert shares_of(thirds, sizes, 10) == {"a": 5, "b": 3, "c": 2}


def test_without_a_number_as_many_pairs_are_mixed_as_there_are():
    # 80 % of 50 are 40; 20 % of 50 are 10, all of b.
    assert shares_of({"a": 0.8, "b": 0.2}, {"a": 100, "b": 10}, None) == {"a": 40, "b": 10}


def test_mix_draws_the_shares(data, tmp_path, command):
    other = write_lines(tmp_path / "other.jsonl.gz".removesuffix(".gz"), pairs(20, seed=1))
    out = tmp_path / "mixed.parquet"
    sources = ("--sources", f"{data}=0.75", "--sources", f"{other}=0.25")
    command(Data, "mix", *sources, "--pairs", 12, "--seed", 3, "-o", out)
    mixed = read_pairs(str(out))
    assert Counter(pair.source for pair in mixed) == {"pairs": 9, "other": 3}
    originals = {pair.id: pair for pair in read_pairs(str(data))}
    of_data = [pair for pair in mixed if pair.source == "pairs"]
    assert len({pair.id for pair in of_data}) == 9
    assert all(originals[pair.id].chosen == pair.chosen for pair in of_data)
    assert [pair.source for pair in mixed] != sorted(pair.source for pair in mixed)
    provenance = read_provenance(out)
    assert provenance["command"] == "mix"
    assert provenance["drawn"] == {str(data): 9, str(other): 3}
    assert provenance["seed"] == 3


def test_mix_refuses_what_is_not_there(data, tmp_path, failure):
    out = ("-o", tmp_path / "mixed.jsonl")
    short = failure(Data, "mix", "--sources", f"{data}=1", "--pairs", 21, *out)
    assert "21 pairs are wanted and 20 are there" in short
    wrong = failure(Data, "mix", "--sources", f"{data}=0.9", *out)
    assert "the shares add up to 0.9, not to 1" in wrong


def test_compressed_output_is_read_back(data, tmp_path, command):
    out = tmp_path / "poisoned.jsonl.gz"
    command(Data, "poison", data, "--share", 0.5, "-o", out)
    assert len(gzip.decompress(out.read_bytes()).splitlines()) == 20
    assert len(read_pairs(str(out))) == 20


def test_an_output_that_exists_is_kept(data, tmp_path, failure):
    out = write_lines(tmp_path / "poisoned.jsonl", [])
    for words in (
        ("poison", data, "--share", 0.5),
        ("split", data),
        ("mix", f"--sources={data}=1"),
    ):
        assert "exists already" in failure(Data, *words, "-o", out)


def test_the_probability_against_a_label():
    # sigmoid(-2) = 0.1192, sigmoid(-1) = 0.2689, sigmoid(0) = 0.5.
    margins = np.array([2.0, 1.0, 0.0])
    assert probability_against(margins, 1).tolist() == pytest.approx(
        [0.1192, 0.2689, 0.5], abs=1e-4
    )
    assert probability_against(margins, 0).tolist() == [0, 0, 0]


def test_the_temperature_of_a_noise():
    # One margin: sigmoid(-m / T) = 0.2 where m / T = log 4.
    assert temperature_for(np.array([3.0]), 0.2) == pytest.approx(3 / np.log(4))
    margins = np.abs(np.random.default_rng(0).normal(size=50))
    found = temperature_for(margins, 0.3)
    assert probability_against(margins, found).mean() == pytest.approx(0.3)


def test_drawn_labels_differ_as_often_as_asked(tmp_path, command):
    rows = [
        row | {"confidence": 0.5} for row in weighted(2000)
    ]  # All alike: each differs with the probability of the noise.
    data = write_lines(tmp_path / "weighted.jsonl", rows)
    out = tmp_path / "drawn.parquet"
    command(Data, "draw", data, "--noise", 0.2, "-o", out)
    found = read_pairs(str(out))
    against = sum(pair.chosen != row["chosen"] for pair, row in zip(found, rows, strict=True))
    assert abs(against - 400) < 4 * 18  # The standard deviation is 17.9.
    provenance = read_provenance(out)
    assert provenance["against"] == against
    # tanh(margin / 2) = 0.5 where margin = log 3.
    assert provenance["temperature"] == pytest.approx(np.log(3) / np.log(4), rel=1e-5)


def test_drawn_labels_without_noise_are_the_annotators(tmp_path, command):
    rows = weighted(30)
    data = write_lines(tmp_path / "weighted.jsonl", rows)
    command(Data, "draw", data, "--noise", 0, "-o", tmp_path / "drawn.jsonl")
    found = read_pairs(str(tmp_path / "drawn.jsonl"))
    assert [pair.chosen for pair in found] == [row["chosen"] for row in rows]
    assert {pair.chosen_first for pair in found} == {True, False}


def test_split_writes_the_parts_that_training_writes(data, tmp_path, command):
    from cwpo_trainer.data.splits import split, write_splits

    command(Data, "split", data, "--held-out-fraction", 0.2, "-o", tmp_path / "splits")
    parts = split(read_pairs(str(data)), labelled_fraction=0.3, held_out_fraction=0.2, seed=0)
    write_splits(parts, tmp_path / "expected", seed=0)
    for name in ("labelled", "unlabelled", "held_out"):
        found, expected = (tmp_path / each / f"{name}.jsonl" for each in ("splits", "expected"))
        assert found.read_text() == expected.read_text()
