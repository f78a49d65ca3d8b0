from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.datasets import NumberedTriplet, read_triplets
from cwpo.errors import DatasetError
from cwpo.types import Message
from cwpo_trainer import data
from cwpo_trainer.data import LabelledPair

ROWS = [
    {"id": "x", "prompt": "p1", "response_a": "good", "response_b": "bad", "preferred": "a"},
    {"id": "y", "prompt": "p2", "response_a": "bad", "response_b": "good", "preferred": "b"},
]
EXPECTED = [LabelledPair("x", "p1", "good", "bad"), LabelledPair("y", "p2", "good", "bad")]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_reads_jsonl_gzip_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert data.read_pairs(str(tmp_path / name)) == EXPECTED


def test_reads_chosen_and_rejected(tmp_path):
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
    assert data.pairs_of(enumerate(rows, 1), "x") == [LabelledPair("1", "p", "good", "bad")]


def test_cuts_whole_transcripts_at_the_last_shared_turn():
    start = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: help\n\nAssistant:"
    row = {"chosen": f"{start} Sure, I can.", "rejected": f"{start} Sorry."}
    (pair,) = data.pairs_of([(1, row)], "x")
    assert pair == LabelledPair("1", start, " Sure, I can.", " Sorry.")


def test_transcripts_that_part_earlier_keep_their_later_turns():
    row = {
        "chosen": "\n\nHuman: hi\n\nAssistant: Yes.\n\nHuman: so\n\nAssistant: Good.",
        "rejected": "\n\nHuman: hi\n\nAssistant: No.\n\nHuman: so\n\nAssistant: Good.",
    }
    (pair,) = data.pairs_of([(1, row)], "x")
    assert pair.prompt == "\n\nHuman: hi\n\nAssistant:"
    assert pair.rejected == " No.\n\nHuman: so\n\nAssistant: Good."


def test_cuts_whole_conversations_before_the_last_message():
    question = {"role": "user", "content": "why"}
    row = {
        "prompt": "why",
        "chosen": [question, {"role": "assistant", "content": "because"}],
        "rejected": [question, {"role": "assistant", "content": "no"}],
    }
    (pair,) = data.pairs_of([(1, row)], "x")
    assert pair == LabelledPair("1", [Message(role="user", content="why")], "because", "no")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "response_a": "a", "response_b": "b"}, "preferred"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "preferred": "tie"}, "preferred"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "same"),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt"),
        ("not JSON", "not JSON"),
    ],
)
def test_a_bad_row_refuses_the_file(bad, reason):
    with pytest.raises(DatasetError, match=f"file: row 7: .*{reason}"):
        data.pairs_of([(1, ROWS[0]), (7, bad)], "file")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./a/b.jsonl", "/a/b", "owner/x/"])
def test_a_missing_file_is_said(source):
    with pytest.raises(DatasetError, match="no such file"):
        data.read_pairs(source)


def test_an_empty_file_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DatasetError, match="holds no pairs"):
        data.read_pairs(str(tmp_path / "a.jsonl"))


def many(prompts=100, each=3):
    return [
        LabelledPair(f"{i}-{j}", f"prompt {i}", f"good {j}", f"bad {j}")
        for i in range(prompts)
        for j in range(each)
    ]


def test_split_keeps_the_pairs_of_a_prompt_together():
    pairs = many()
    parts = data.split(pairs, labelled_fraction=0.3, held_out_fraction=0.1, seed=0)
    sets = (parts.labelled, parts.unlabelled, parts.held_out)
    assert [len(part) for part in sets] == [81, 189, 30]
    prompts = [{pair.prompt for pair in part} for part in sets]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 100
    assert sorted(pair.id for part in sets for pair in part) == sorted(pair.id for pair in pairs)


def test_split_follows_its_seed():
    def labelled(seed):
        return data.split(many(), labelled_fraction=0.3, held_out_fraction=0.1, seed=seed).labelled

    assert labelled(1) == labelled(1) != labelled(2)


def test_split_refuses_to_leave_a_wanted_part_empty():
    with pytest.raises(DatasetError, match="too few"):
        data.split(many(1), labelled_fraction=0.3, held_out_fraction=0.1, seed=0)


def test_written_splits_are_read_back_and_annotatable(tmp_path):
    parts = data.split(many(), labelled_fraction=0.3, held_out_fraction=0.1, seed=0)
    data.write_splits(parts, tmp_path / "splits", seed=0)
    for name in ("labelled", "unlabelled", "held_out"):
        path = tmp_path / "splits" / f"{name}.jsonl"
        assert data.read_pairs(str(path)) == getattr(parts, name)
        with path.open("rb") as stream:
            rows = list(read_triplets(stream, "jsonl"))
        assert all(isinstance(row, NumberedTriplet) for row in rows)
        a_is_chosen = [row.triplet.response_a.startswith("good") for row in rows]
        assert 0.2 < sum(a_is_chosen) / len(rows) < 0.8


def test_fingerprint_tells_data_apart():
    pairs = many(2)
    assert data.fingerprint(pairs) == data.fingerprint(many(2))
    assert data.fingerprint(pairs) != data.fingerprint(pairs[::-1])
