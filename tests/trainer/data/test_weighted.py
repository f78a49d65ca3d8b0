from __future__ import annotations

import json
import math
from hashlib import sha256

import numpy as np
import pyarrow.parquet as pq
import pytest

from cwpo.datasets.weighted import weighted_row, weighted_schema, weighted_writer
from cwpo.errors import DatasetError
from cwpo.types import Annotation, Message, ModelRef, Triplet
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import read_annotator, read_weighted, weights_of


def written(path, prompt="p", confidences=(0.5, 0.0, 0.25), calibrated=None):
    rows = [
        weighted_row(
            Triplet(id=str(i), prompt=prompt, response_a=f"a{i}", response_b=f"b{i}"),
            Annotation(
                id=str(i),
                preferred="b" if i else "a",
                confidence=confidence,
                score_a=0,
                score_b=0,
                calibrated_confidence=calibrated,
            ),
        )
        for i, confidence in enumerate(confidences)
    ]
    with path.open("wb") as sink, weighted_writer(sink, path.suffix[1:]) as writer:
        writer.write(rows)
    return path


@pytest.mark.parametrize("name", ["w.parquet", "w.jsonl"])
@pytest.mark.parametrize("prompt", ["p", [Message(role="user", content="p")]])
def test_reads_what_annotation_writes(name, prompt, tmp_path):
    pairs = [*read_weighted(written(tmp_path / name, prompt))]
    assert [(p.prompt, p.chosen, p.rejected, p.confidence) for p in pairs] == [
        (prompt, "a0", "b0", 0.5),
        (prompt, "b1", "a1", 0.0),
        (prompt, "b2", "a2", 0.25),
    ]


def test_reads_calibrated_confidence_where_it_is_asked_for(tmp_path):
    path = written(tmp_path / "w.parquet", calibrated=0.75)
    assert {pair.confidence for pair in read_weighted(path, calibrated=True)} == {0.75}
    with pytest.raises(DatasetError, match="calibrated_confidence is missing"):
        [*read_weighted(written(tmp_path / "v.parquet"), calibrated=True)]


@pytest.mark.parametrize(
    ("confidence", "message"),
    [
        (None, "confidence is missing"),
        (math.nan, "confidence is not a number"),
        (1.5, "not in"),
        (-0.1, "not in"),
        ("high", "confidence is not a number"),
        (True, "confidence is not a number"),
    ],
)
def test_refuses_unusable_confidence(confidence, message, tmp_path):
    path = tmp_path / "w.jsonl"
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 0.5}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"confidence": confidence}) + "\n")
    with pytest.raises(DatasetError, match=f"row 2: .*{message}"):
        [*read_weighted(path)]


def test_refuses_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(DatasetError, match=r"w\.jsonl: No such file"):
        [*read_weighted(tmp_path / "w.jsonl")]
    (tmp_path / "w.jsonl").write_text("")
    with pytest.raises(DatasetError, match="holds no pairs"):
        [*read_weighted(tmp_path / "w.jsonl")]


def weighed(pairs, name, *, by_prompt=False, **options):
    """The weights of pairs in Python."""
    confidences = np.array([pair.confidence for pair in pairs], dtype=np.float32)
    counts = np.array([pair.prompt_pairs for pair in pairs]) if by_prompt else None
    return weights_of(confidences, name, prompt_pairs=counts, **options)


def test_weights(tmp_path):
    pairs = [*read_weighted(written(tmp_path / "w.parquet"))]
    assert weighed(pairs, "confidence", normalise=False).tolist() == [0.5, 0.0, 0.25]
    assert weighed(pairs, "confidence", normalise=True).tolist() == [2.0, 0.0, 1.0]
    assert weighed(pairs, "none", normalise=True).tolist() == [1.0, 1.0, 1.0]
    assert weighed(pairs, "none", normalise=False).dtype == np.float32


def test_weights_that_are_all_zero_are_refused(tmp_path):
    pairs = [*read_weighted(written(tmp_path / "w.parquet", confidences=(0.0, 0.0)))]
    with pytest.raises(DatasetError, match="every weight is 0"):
        weighed(pairs, "confidence", normalise=True)


def folder_of(path, *parts):
    """A folder of parts as a download leaves it, a part for each sequence of confidences."""
    path.mkdir()
    listed = []
    for index, confidences in enumerate(parts):
        file = written(path / f"part-{index:08d}.parquet", confidences=confidences)
        listed.append(
            {
                "name": file.name,
                "rows": len(confidences),
                "bytes": file.stat().st_size,
                "sha256": sha256(file.read_bytes()).hexdigest(),
            }
        )
    rows, size = (sum(part[key] for part in listed) for key in ("rows", "bytes"))
    manifest = {"parts": listed, "schema": [], "rows": rows, "bytes": size}
    (path / "dataset.json").write_text(json.dumps(manifest))
    return path


def test_a_folder_of_parts_is_read_as_one_dataset(tmp_path):
    folder = folder_of(tmp_path / "parts", (0.5, 0.25), (0.125,), (0.75, 1.5))
    with pytest.raises(DatasetError, match=r"parts: row 5: confidence is 1\.5"):
        [*read_weighted(folder)]
    folder = folder_of(tmp_path / "good", (0.5, 0.25), (0.125,))
    assert [pair.confidence for pair in read_weighted(folder)] == [0.5, 0.25, 0.125]
    assert len(read_pairs(str(folder))) == 3
    assert read_annotator(folder) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "part-00000001.parquet").unlink(), "part-00000001.* is missing"),
        (lambda folder: (folder / "part-00000000.parquet").write_bytes(b"x"), "part-00000000"),
        (lambda folder: (folder / "dataset.incomplete").touch(), "download was interrupted"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "dataset.json: .*Field"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, spoil, message):
    folder = folder_of(tmp_path / "parts", (0.5,), (0.25,))
    spoil(folder)
    with pytest.raises(DatasetError, match=message):
        [*read_weighted(folder)]


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path):
    for name, confidence in (("b", 0.25), ("a", 0.5)):
        written(tmp_path / f"{name}.parquet", confidences=(confidence,))
    (tmp_path / "notes.jsonl").write_text("not a pair\n")
    assert [pair.confidence for pair in read_weighted(tmp_path)] == [0.5, 0.25]
    assert len(read_pairs(str(tmp_path))) == 2


def test_a_folder_without_parquet_files_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no \.parquet file"):
        [*read_weighted(tmp_path)]


def test_files_of_two_annotators_are_refused(tmp_path):
    for revision in ("1", "2"):
        model = ModelRef(name="annotator", revision=revision)
        says = weighted_schema(chat=False, calibrated=False, model=model).metadata
        file = written(tmp_path / f"{revision}.parquet", confidences=(0.5,))
        pq.write_table(pq.read_table(file).replace_schema_metadata(says), file)
    with pytest.raises(DatasetError, match=r"1\.parquet and 2\.parquet are not of one annotator"):
        read_annotator(tmp_path)


def of_lists(path, *prompt_pairs, confidence=0.5, **changes):
    """A dataset of pairs, each of a prompt that gave so many."""
    rows = [
        {"id": f"{n}", "prompt": "p", "chosen": f"a{n}", "rejected": f"b{n}"}
        | {"confidence": confidence, "prompt_pairs": count}
        | changes.get(f"row_{n}", {})
        for n, count in enumerate(prompt_pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_pairs_of_a_prompt_weigh_together_as_much_as_one(tmp_path):
    path = of_lists(tmp_path / "w.jsonl", 3, 3, 3, 1, row_3={"confidence": 0.25})
    pairs = [*read_weighted(path)]
    assert [pair.prompt_pairs for pair in pairs] == [3, 3, 3, 1]

    def weights(**options):
        return weighed(pairs, "confidence", **options).tolist()

    sixth = pytest.approx(1 / 6)
    assert weights(normalise=False, by_prompt=True) == [sixth, sixth, sixth, 0.25]
    assert weights(normalise=False) == [0.5, 0.5, 0.5, 0.25]
    normalised = weights(normalise=True, by_prompt=True)
    assert sum(normalised) == pytest.approx(4)
    assert sum(normalised[:3]) / normalised[3] == pytest.approx(2)
    assert weighed(pairs, "none", normalise=False, by_prompt=True).tolist() == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 1]
    )


@pytest.mark.parametrize(
    "tie",
    [
        {"chosen": "same", "rejected": "same", "confidence": 0, "preferred": "a"},
        {"preferred": "tie", "confidence": 0},
        {"confidence": 0},
    ],
)
def test_ties_are_left_out_and_counted(tie, tmp_path):
    path = of_lists(tmp_path / "w.jsonl", 3, 3, 3, row_1=tie)
    unused = UnusedRows()
    assert [pair.id for pair in read_weighted(path, unused)] == ["0", "2"]
    assert (unused.rows, unused.ties, unused.rejected.total()) == (3, 1, 0)


def test_a_label_of_confidence_0_is_no_tie(tmp_path):
    path = of_lists(tmp_path / "w.jsonl", 1, 1, row_1={"confidence": 0, "preferred": "b"})
    assert [pair.confidence for pair in read_weighted(path)] == [0.5, 0]


def test_a_dataset_of_ties_holds_no_pairs(tmp_path):
    path = of_lists(tmp_path / "w.jsonl", 1, 1, confidence=0)
    with pytest.raises(DatasetError, match="holds no pairs"):
        [*read_weighted(path)]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_prompt_pairs_that_are_no_count_are_refused_with_the_row(tmp_path, value):
    path = of_lists(tmp_path / "w.jsonl", 1, value)
    with pytest.raises(DatasetError, match=r"w\.jsonl: row 2: prompt_pairs is not a number from 1"):
        [*read_weighted(path)]


def test_prompt_pairs_in_some_rows_only_are_refused(tmp_path):
    path = of_lists(tmp_path / "w.jsonl", 2, 2)
    with path.open("a") as sink:
        row = {"id": "x", "prompt": "p", "chosen": "a", "rejected": "b", "confidence": 1}
        sink.write(json.dumps(row) + "\n")
    with pytest.raises(DatasetError, match="2 of 3 rows have prompt_pairs: give the others"):
        [*read_weighted(path)]
