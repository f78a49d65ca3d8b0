from __future__ import annotations

import pytest

from cwpo.datasets.triplets import NumberedTriplet, read_triplets
from cwpo.errors import DatasetError
from cwpo_trainer.data.labelled import LabelledPair, read_pairs
from cwpo_trainer.data.splits import split, write_splits


def many(prompts=100, each=3):
    return [
        LabelledPair(f"{i}-{j}", f"prompt {i}", f"good {j}", f"bad {j}")
        for i in range(prompts)
        for j in range(each)
    ]


def test_split_keeps_the_pairs_of_a_prompt_together():
    pairs = many()
    parts = split(pairs, labelled_fraction=0.3, held_out_fraction=0.1, seed=0)
    sets = (parts.labelled, parts.unlabelled, parts.held_out)
    assert [len(part) for part in sets] == [81, 189, 30]
    prompts = [{pair.prompt for pair in part} for part in sets]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 100
    assert sorted(pair.id for part in sets for pair in part) == sorted(pair.id for pair in pairs)


def test_split_follows_its_seed():
    def labelled(seed):
        return split(many(), labelled_fraction=0.3, held_out_fraction=0.1, seed=seed).labelled

    assert labelled(1) == labelled(1) != labelled(2)


def test_split_refuses_to_leave_a_wanted_part_empty():
    with pytest.raises(DatasetError, match="too few"):
        split(many(1), labelled_fraction=0.3, held_out_fraction=0.1, seed=0)


def test_written_splits_are_read_back_and_annotatable(tmp_path):
    parts = split(many(), labelled_fraction=0.3, held_out_fraction=0.1, seed=0)
    write_splits(parts, tmp_path / "splits", seed=0)
    for name in ("labelled", "unlabelled", "held_out"):
        path = tmp_path / "splits" / f"{name}.jsonl"
        assert read_pairs(str(path)) == getattr(parts, name)
        with path.open("rb") as stream:
            rows = list(read_triplets(stream, "jsonl"))
        assert all(isinstance(row, NumberedTriplet) for row in rows)
        a_is_chosen = [row.triplet.response_a.startswith("good") for row in rows]
        assert 0.2 < sum(a_is_chosen) / len(rows) < 0.8
