"""`cwpo push`: what arrives at a Hub of the tests."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from cwpo.datasets.weighted import weighted_schema
from cwpo.types import Certificate, ModelRef
from cwpo_annotator.checkpoint import Card, EncodingSpec

from .cards.test_policy_card import row
from .hub import REPOSITORY, Hub, with_hub
from .samples import weighted, write_lines

pytestmark = pytest.mark.slow


def push(hub, *words):
    done = with_hub(hub, "-m", "cwpo", "push", *map(str, words))
    return done.returncode, done.stdout, done.stderr


def rows_with(*confidences):
    rows = weighted(len(confidences))
    for each, confidence in zip(rows, confidences, strict=True):
        each["confidence"] = confidence
    return rows


def test_a_dataset_arrives_with_its_card(hub, tmp_path):
    rows = [*rows_with(0.05, 0.75, 0.75, 1.0), rows_with(0.0)[0] | {"preferred": "tie"}]
    data = write_lines(tmp_path / "w.jsonl", rows)
    code, out, err = push(hub, "dataset", data, REPOSITORY, "--license", "cc-by-4.0")
    assert code == 0, err
    assert out == f"https://huggingface.co/datasets/{REPOSITORY}\n"
    (created,) = Hub.created
    assert created["type"] == "dataset"
    assert created.get("private") or created.get("visibility") == "private"
    assert {*Hub.files} == {"README.md", "data/w.jsonl"}
    assert Hub.files["data/w.jsonl"] == data.read_bytes()
    card = DatasetCard(Hub.files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == "n<1K"
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/w.jsonl"}]
    assert row(card, "pairs") == "5"
    assert row(card, "ties, of weight 0") == "1"
    assert float(row(card, "mean confidence")) == pytest.approx(2.55 / 5)
    assert row(card, "0.7 to 0.8") == "40.0%"
    assert row(card, "0.9 to 1") == "20.0%"
    assert row(card, "0 to 0.1") == "40.0%"
    assert row(card, "annotator") == "not named by the files"
    assert str(tmp_path) not in str(card)


def test_the_card_names_the_annotator_and_a_licence_to_fill_in(hub, tmp_path):
    model = ModelRef(name="small", revision="0123456789ab")
    promised = Certificate(
        max_error=0.1, delta=0.05, threshold=0.5, coverage=0.4, pairs=200, errors=9
    )
    schema = weighted_schema(chat=False, calibrated=False, model=model, certificate=promised)
    says = schema.metadata
    for name in ("a", "b"):
        table = pa.Table.from_pylist(rows_with(0.5, 0.25)).replace_schema_metadata(says)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    code, _, err = push(hub, "dataset", tmp_path, REPOSITORY)
    assert code == 0, err
    assert {*Hub.files} == {"README.md", "data/a.parquet", "data/b.parquet"}
    card = DatasetCard(Hub.files["README.md"].decode())
    assert row(card, "annotator") == "`small`, revision `0123456789ab`"
    assert "confidence above 0.5, at most 10% are wrong" in row(card, "certificate")
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert "fill in `license`" in card.text


def test_an_annotator_arrives_with_the_card_of_its_training(hub, tmp_path):
    (tmp_path / "annotator.json").write_text(
        Card(encoding=EncodingSpec(max_length=64, pad_token="<pad>")).model_dump_json()
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# An annotator\n")
    code, out, err = push(hub, "annotator", tmp_path, REPOSITORY)
    assert code == 0, err
    assert out == f"https://huggingface.co/{REPOSITORY}\n"
    assert {*Hub.files} == {"README.md", "annotator.json"}


@pytest.mark.parametrize(
    ("kind", "named", "message"),
    [
        ("dataset", "nothing.parquet", "nothing.parquet: no such file"),
        ("dataset", "bad.jsonl", "bad.jsonl: row 1: confidence is missing"),
        ("annotator", ".", "it has no annotator.json"),
    ],
)
def test_what_is_none_is_refused(kind, named, message, hub, tmp_path):
    rows = [{name: value for name, value in rows_with(0.5)[0].items() if name != "confidence"}]
    write_lines(tmp_path / "bad.jsonl", rows)
    code, _, err = push(hub, kind, tmp_path / named, REPOSITORY)
    assert code != 0
    assert message in err
    assert not Hub.created


def test_a_repository_has_an_owner(hub, tmp_path):
    data = write_lines(tmp_path / "w.jsonl", rows_with(0.5))
    code, _, err = push(hub, "dataset", data, "weighted")
    assert code != 0
    assert "owner/name" in err
