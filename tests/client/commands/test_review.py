"""`cwpo review`: from a weighted dataset to people and back to labelled pairs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cwpo import Triplet
from cwpo.commands.review import Export, Import
from cwpo.datasets.weighted import weighted_row, weighted_writer
from cwpo.errors import CwpoError, DatasetError
from cwpo_annotator import Annotator
from cwpo_trainer.data.labelled import read_pairs
from harness import labels_of, serving

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture(params=["parquet", "jsonl"])
def weighted(request, tmp_path):
    """A weighted dataset of 200 rows."""
    return written(tmp_path / f"weighted.{request.param}", [f"question {n}" for n in range(200)])


def written(path, prompts):
    triplets = [
        Triplet(id=f"r{at}", prompt=prompt, response_a=f"yes, {at}", response_b='no\n"=1+1"')
        for at, prompt in enumerate(prompts)
    ]
    rows = [weighted_row(t, label) for t, label in zip(triplets, labels_of(triplets), strict=True)]
    with path.open("wb") as sink, weighted_writer(sink, path.suffix[1:]) as writer:
        writer.write(rows)
    return path


def export(weighted, path, **options):
    options = {"below": 0.3, "most": 20, "at_random": True, **options}
    Export(dataset=weighted, output=path, **options).cli_cmd()


def imported(path, answers, **options):
    Import(answers=answers, output=path, **options).cli_cmd()
    return [json.loads(line) for line in path.read_text().splitlines()]


def sheet(path):
    with path.open(newline="") as stream:
        return [*csv.DictReader(stream)]


def test_uncertain_rows_are_exported_in_the_order_of_the_input(weighted, tmp_path, capsys):
    export(weighted, tmp_path / "pairs.csv")
    rows = sheet(tmp_path / "pairs.csv")
    triplets = [
        Triplet(id=f"r{at}", prompt=f"question {at}", response_a=f"yes, {at}", response_b="x")
        for at in range(200)
    ]
    assert len(rows) == 20
    assert all(float(row["confidence"]) < 0.3 for row in rows)
    for row in rows:
        number = int(row["id"].removeprefix("r"))
        assert row["prompt"] == triplets[number].prompt
        assert (row["response_a"], row["response_b"]) == (f"yes, {number}", 'no\n"=1+1"')
    assert "20 rows, drawn at random from the " in capsys.readouterr().out


def test_rows_are_spread_over_the_data_by_what_the_service_embeds(tiny_annotator, tmp_path, capsys):
    """Of many that are equal, only one comes before all that are not."""
    others = ["why not", "a cat sat", "1 2 3 4 5 6", "yes yes yes"]
    triplets = [
        Triplet(id=f"r{at}", prompt="q", response_a=text, response_b="no")
        for at, text in enumerate([*["maybe"] * 20, *others])
    ]
    rows = [weighted_row(t, label) for t, label in zip(triplets, labels_of(triplets), strict=True)]
    weighted = tmp_path / "weighted.jsonl"
    with weighted.open("wb") as sink, weighted_writer(sink, "jsonl") as writer:
        writer.write(rows)

    def load():
        return Annotator.load(tiny_annotator, dtype="float32")

    with serving(load) as service:
        options = {"at_random": False, "below": 1, "most": 5}
        export(weighted, tmp_path / "pairs.csv", url=service.url, **options)
    assert {row["response_a"] for row in sheet(tmp_path / "pairs.csv")} == {"maybe", *others}
    assert "5 rows, spread over the " in capsys.readouterr().out


@pytest.mark.parametrize("is_there", [True, False], ids=["of-null", "down"])
def test_without_embeddings_the_way_out_is_named(weighted, tmp_path, is_there):
    with serving() as service:
        url = service.url if is_there else "http://127.0.0.1:9"
        with pytest.raises(CwpoError, match="--at-random"):
            export(weighted, tmp_path / "pairs.csv", at_random=False, url=url)
    assert not (tmp_path / "pairs.csv").exists()


def test_labels_may_be_added_to_their_own_file(tmp_path):
    pair = {"prompt": "p", "response_a": "good", "response_b": "bad"}
    labelled = tmp_path / "labelled.jsonl"
    # Half of a character, as JSON may hold it.
    labelled.write_text(json.dumps(pair | {"prompt": "\ud800", "preferred": "a"}) + "\n")
    answer = pair | {"id": "1", "preferred": "b", "reviewer": "Ada"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    lines = imported(labelled, [tmp_path / "answers.jsonl"], labelled=labelled)
    assert [(line["prompt"], line["preferred"]) for line in lines] == [("\ud800", "a"), ("p", "b")]


def test_answers_in_a_sheet_become_labels_that_training_reads(weighted, tmp_path, capsys):
    export(weighted, tmp_path / "pairs.csv")
    rows = sheet(tmp_path / "pairs.csv")
    for row, preferred in zip(rows, ["a", "B ", "tie"], strict=False):
        row.update(preferred=preferred, reviewer="ann")
    with (tmp_path / "answers.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "before.jsonl").write_text(
        json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n"
    )
    output = tmp_path / "labelled.jsonl"
    lines = imported(output, [tmp_path / "answers.csv"], labelled=tmp_path / "before.jsonl")
    assert lines[0] == {"prompt": "p", "chosen": "good", "rejected": "bad"}
    assert [line["preferred"] for line in lines[1:]] == ["a", "b"]
    pairs = read_pairs(str(output))
    assert [pair.chosen for pair in pairs] == [
        "good",
        rows[0]["response_a"],
        rows[1]["response_b"],
    ]
    said = capsys.readouterr().out
    assert "3 labelled pairs, 2 of them from review" in said
    assert "1 ties" in said


def test_a_sheet_runs_no_text_as_a_formula_and_gives_it_back(tmp_path):
    """Prompts and responses are of strangers and of models; spreadsheets run what starts with =."""
    texts = ["=1+1", "@SUM(A1)", "+1", "- a list", "\tindented", "'=quoted", "'plain", "a = b"]
    weighted = written(tmp_path / "w.jsonl", texts)
    export(weighted, tmp_path / "pairs.csv", below=1)
    rows = sheet(tmp_path / "pairs.csv")
    assert len(rows) == len(texts)
    assert not [cell for row in rows for cell in row.values() if cell[:1] in tuple("=@+-\t\r")]
    with (tmp_path / "answers.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(row | {"preferred": "a", "reviewer": "ann"} for row in rows)
    lines = imported(tmp_path / "labelled.jsonl", [tmp_path / "answers.csv"])
    assert sorted(line["prompt"] for line in lines) == sorted(texts)


@pytest.mark.parametrize("prompts", [["plain"], [CHAT]])
def test_argilla_s_answers_come_back(tmp_path, prompts):
    weighted = written(tmp_path / "w.jsonl", prompts)
    export(weighted, tmp_path / "pairs.json", below=1, format="argilla")
    records = json.loads((tmp_path / "pairs.json").read_text())
    records[0]["responses"] = {
        "preferred": [
            {"value": "a", "user_id": "u1", "status": "submitted"},
            {"value": "a", "user_id": "u2"},
            {"value": "b", "user_id": "u3", "status": "discarded"},
        ]
    }
    (tmp_path / "answers.json").write_text(json.dumps(records))
    (line,) = imported(tmp_path / "out.jsonl", [tmp_path / "answers.json"])
    assert line["prompt"] == prompts[0]
    assert (line["preferred"], line["reviewers"]) == ("a", ["u1", "u2"])


@pytest.mark.parametrize(
    "value", [{"choices": ["b"]}, {"selected": "right"}], ids=["choices", "pairwise"]
)
@pytest.mark.parametrize("prompts", [["plain"], [CHAT]])
def test_label_studio_s_answers_come_back(tmp_path, prompts, value):
    weighted = written(tmp_path / "w.jsonl", prompts)
    export(weighted, tmp_path / "pairs.json", below=1, format="label-studio")
    (task,) = json.loads((tmp_path / "pairs.json").read_text())
    task["annotations"] = [
        {"result": [{"value": value}], "completed_by": {"id": 3, "email": "ann@example.org"}},
        {"result": [{"value": {"choices": ["a"]}}], "completed_by": 4, "was_cancelled": True},
        {"result": [], "completed_by": 5},
    ]
    (tmp_path / "answers.json").write_text(json.dumps([task]))
    (line,) = imported(tmp_path / "out.jsonl", [tmp_path / "answers.json"])
    assert line["prompt"] == prompts[0]
    assert (line["preferred"], line["reviewers"]) == ("b", ["ann@example.org"])


@pytest.mark.parametrize("tool", ["argilla", "label-studio"])
def test_what_the_tools_themselves_write_comes_back(tmp_path, tool):
    """Of two exported rows: read, answered and written by argilla 2.8.0 and label-studio-sdk 2.1.2.

    The latter has checked tasks and answers by the labelling configuration of docs/page.md.
    """
    answers = Path(__file__).parent / "exports" / f"{tool}.json"
    labelled = written(tmp_path / "w.jsonl", ["question 0", "question 1"])
    export(labelled, tmp_path / "ours.json", below=1, format=tool)
    ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "ours.json", answers))
    assert [*ours[0]] == [name for name in theirs[0] if name in ours[0]]
    (line,) = imported(tmp_path / "out.jsonl", [answers])
    assert (line["id"], line["prompt"], line["preferred"]) == ("r0", "question 0", "b")
    assert len(line["reviewers"]) == (2 if tool == "argilla" else 1)


def test_the_report_is_json_too(weighted, tmp_path, capsys):
    answers = [
        {
            **{"id": "1", "prompt": "p", "response_a": "x", "response_b": "y"},
            **{"preferred": "a", "reviewer": name, "annotator": "b", "confidence": 0.01},
        }
        for name in ("ann", "bob")
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in answers))
    imported(tmp_path / "out.jsonl", [path], json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["between_reviewers"] == {"share": 1.0, "compared": 1}
    assert report["with_annotator"] == {"share": 0.0, "compared": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,prompt\n1,p\n", "row 1 is not what `cwpo review export` wrote"),
        (
            "a.csv",
            "id,prompt,response_a,response_b,preferred\n1,p,x,y,left\n",
            "row 1: preferred",
        ),
        ("a.json", "[{}]", "record 1 is not what"),
        ("a.json", "{", "line 1 is not JSON"),
        ("a.txt", "", ".csv, .json or .jsonl"),
        ("a.csv", "id,prompt,response_a,response_b,preferred\n1,p,x,y,\n", "nobody has answered"),
    ],
)
def test_what_is_no_answer_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        imported(tmp_path / "out.jsonl", [tmp_path / name])
    assert not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_exported_is_named(weighted, tmp_path):
    with pytest.raises(DatasetError, match="no row has a confidence below 1e-09"):
        export(weighted, tmp_path / "pairs.csv", below=1e-9)
    with pytest.raises(DatasetError, match=r"are a \.json"):
        export(weighted, tmp_path / "pairs.csv", format="argilla")
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y"}) + "\n")
    with pytest.raises(DatasetError, match="row 1 is no row of a weighted dataset"):
        export(labelled, tmp_path / "pairs.csv")
