"""`cwpo evaluate annotator` tells which labels can be trusted, and keeps it in annotator.json."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

from cwpo.commands.review import Review
from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import read_card, revisions
from cwpo_annotator.commands import Quantize
from cwpo_trainer.commands import Evaluate
from cwpo_trainer.data.labelled import LabelledPair, read_pairs
from cwpo_trainer.data.labelled_prompts import LabelledPrompts
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, write_lines


@pytest.fixture(scope="module")
def annotated(tiny_annotator):
    """Pairs of 400 prompts with the tiny annotator's labels, the most confident first."""
    rows = pairs(400)
    triplets = [Triplet(**{k: v for k, v in row.items() if k != "preferred"}) for row in rows]
    labels = Annotator.load(tiny_annotator, dtype="float32").annotate(triplets)
    for row, label in zip(rows, labels, strict=True):
        row |= {"preferred": label.preferred, "confidence": label.confidence}
    return sorted(rows, key=lambda row: -row["confidence"])


@pytest.fixture
def folder(tiny_annotator, tmp_path):
    return shutil.copytree(tiny_annotator, tmp_path / "annotator")


def flipped(row):
    return row | {"preferred": "b" if row["preferred"] == "a" else "a"}


@pytest.fixture
def trusted(annotated, tmp_path):
    """People agree with the most confident half of the labels, and with every second other."""
    rows = [flipped(row) if at > 200 and at % 2 else row for at, row in enumerate(annotated)]
    rows[7] = flipped(rows[7])
    return write_lines(tmp_path / "labelled.jsonl", rows)


def evaluate(command, folder, data, *flags):
    command(Evaluate, "annotator", folder, "--data", data, "--dtype", "float32", *flags)


def test_the_certificate_is_kept_and_changes_no_revision(folder, trusted, command, capsys):
    before = revisions(folder)
    evaluate(command, folder, trusted, "--max-error", 0.1, "--delta", 0.05, "--certify")
    (kept,) = json.loads((folder / "annotator.json").read_text())["certificates"]
    assert set(kept) == {
        *("max_error", "delta", "threshold", "coverage", "pairs", "errors", "data_fingerprint")
    }
    confidences = np.array([json.loads(line)["confidence"] for line in trusted.open()])
    assert kept["pairs"] == pytest.approx((confidences > kept["threshold"]).sum(), abs=1)
    assert 0.4 < kept["coverage"] < 0.65
    assert revisions(folder) == before
    assert Annotator.load(folder).model.revision == before.current
    said = capsys.readouterr().out
    assert f"Usable: of the labels with a confidence above {kept['threshold']:.4g}" in said
    assert "It holds for data exchangeable with these pairs" in said


def test_an_int8_copy_is_certified_by_its_own_confidences(
    annotated, folder, trusted, tmp_path, command
):
    copy = tmp_path / "int8"
    names = ("prompt", "response_a", "response_b")
    surest = [{name: row[name] for name in names} for row in annotated[:200]]
    sample = write_lines(tmp_path / "sample.jsonl", surest)
    command(Quantize, "--annotator", folder, "--calibration", sample, "--output", copy)
    evaluate(command, folder, trusted, "--certify")
    command(Evaluate, "annotator", copy, "--data", trusted, "--dtype", "int8", "--certify")
    (ours,), (exact,) = (read_card(place).certificates for place in (copy, folder))
    rounded = Annotator.load(copy, dtype="int8").annotate(
        [pair.triplet for pair in read_pairs(str(trusted))]
    )
    confidences = [label.confidence for label in rounded]
    assert ours.threshold != exact.threshold
    assert min(abs(each - ours.threshold) for each in confidences) < 1e-6


def test_a_certificate_takes_the_place_of_one_that_promises_the_same(folder, trusted, command):
    for error in (0.1, 0.2, 0.1):
        evaluate(command, folder, trusted, "--max-error", error, "--certify")
    certificates = read_card(folder).certificates
    assert sorted(each.max_error for each in certificates) == [0.1, 0.2]
    low, high = sorted(certificates, key=lambda each: each.max_error)
    assert high.coverage > low.coverage


def test_programs_get_the_figures_alone(folder, trusted, tmp_path, command, capsys):
    output = tmp_path / "out"
    evaluate(command, folder, trusted, "--output", output, "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures.pop("page") == str(output / "report.html")
    results = read_record(output).results
    assert {**results, **figures} == results
    assert figures["certificate"]["max_error"] == 0.1


def test_nothing_is_kept_unless_asked(folder, trusted, command):
    before = (folder / "annotator.json").read_bytes()
    evaluate(command, folder, trusted)
    assert (folder / "annotator.json").read_bytes() == before


def test_without_a_certificate_the_verdict_says_what_to_do(
    annotated, folder, tmp_path, failure, command, capsys
):
    coin = [flipped(row) if at % 2 else row for at, row in enumerate(annotated)]
    data = write_lines(tmp_path / "coin.jsonl", coin)
    message = failure(Evaluate, "annotator", folder, "--data", data, "--certify")
    assert message.endswith("no certificate, as said above")
    assert read_card(folder).certificates is None
    said = capsys.readouterr().out
    assert "Not usable: its labels cannot be told from guesses" in said
    assert "More labels to measure it on would not help" in said
    assert "Label next, to train on: pairs with a confidence up to" in said
    few = write_lines(tmp_path / "few.jsonl", annotated[:20])
    evaluate(command, folder, few)
    said = capsys.readouterr().out
    assert "Not usable where at most 10% of labels may be wrong" in said
    assert "with about 29, each of another conversation (now 20)" in said


def test_surest_labels_that_are_wrong_are_pointed_at(annotated, folder, tmp_path, command, capsys):
    rows = [flipped(row) if at < 20 else row for at, row in enumerate(annotated)]
    evaluate(command, folder, write_lines(tmp_path / "surest.jsonl", rows))
    assert "not among its surest labels, where the test begins" in capsys.readouterr().out


def test_pairs_of_one_conversation_count_once(annotated, folder, tmp_path, command, capsys):
    # 400 pairs that all agree, but of 20 prompts only.
    rows = [row | {"prompt": annotated[at % 20]["prompt"]} for at, row in enumerate(annotated)]
    triplets = [
        Triplet(prompt=row["prompt"], response_a=row["response_a"], response_b=row["response_b"])
        for row in rows
    ]
    labels = Annotator.load(folder, dtype="float32").annotate(triplets)
    rows = [row | {"preferred": label.preferred} for row, label in zip(rows, labels, strict=True)]
    evaluate(command, folder, write_lines(tmp_path / "grouped.jsonl", rows))
    said = capsys.readouterr().out
    assert "accuracy 100.0% on 400 pairs" in said
    assert "Not usable where" in said
    assert "(now 20)" in said


def test_labels_that_the_annotator_has_seen_are_refused(folder, trusted, tmp_path, failure):
    seen = read_pairs(str(trusted))[:3]
    LabelledPrompts.of(seen).write(folder)
    flags = ("annotator", folder, "--data", trusted, "--output", tmp_path / "out")
    message = failure(Evaluate, *flags)
    assert "3 of 400 pairs are of conversations that this annotator was trained" in message
    assert repr(seen[0].id) in message
    assert not (tmp_path / "out").exists()


def test_an_annotator_that_does_not_tell_is_doubted(folder, trusted, command, capsys):
    doubt = "The annotator does not tell which labels it was trained on"
    evaluate(command, folder, trusted)
    assert doubt in capsys.readouterr().out
    LabelledPrompts.of([LabelledPair("0", "another", "a", "b")]).write(folder)
    evaluate(command, folder, trusted)
    assert doubt not in capsys.readouterr().out


def test_of_an_older_checkpoint_the_same_file_is_known(folder, trusted, failure, tmp_path):
    from cwpo_annotator.checkpoint import write_card
    from cwpo_trainer.data.labelled import fingerprint

    card = read_card(folder)
    card.data_fingerprint = fingerprint(read_pairs(str(trusted)))
    write_card(folder, card)
    message = failure(Evaluate, "annotator", folder, "--data", trusted)
    assert "trained on these very pairs" in message


def test_a_certificate_needs_a_folder(trusted, failure):
    flags = ("--data", trusted, "--certify")
    message = failure(Evaluate, "annotator", "acme/annotator", *flags)
    assert "--certify writes into the annotator's folder, and acme/annotator is none" in message


def test_the_output_has_figures_mistakes_and_a_page(folder, trusted, tmp_path, command):
    output = tmp_path / "out"
    evaluate(command, folder, trusted, "--output", output)
    results = read_record(output).results
    assert results["certificate"]["errors"] >= 1
    assert results["length_bias"]["people"]["pairs"] <= 400
    mistakes = read_lines(output / "mistakes.jsonl")
    assert len(mistakes) == 20
    confidences = [line["confidence"] for line in mistakes]
    assert confidences == sorted(confidences, reverse=True)
    surest = json.loads([*trusted.open()][7])
    assert mistakes[0]["id"] == surest["id"]
    chosen = surest["response_a" if surest["preferred"] == "a" else "response_b"]
    assert mistakes[0]["chosen"] == chosen
    page = (output / "report.html").read_text()
    for text in ("Which labels can be trusted", "Usable: of the labels", "people prefer it"):
        assert text in page
    assert page.count("<svg") == 3
    assert page.count("<details>") == 20 + 1


def test_other_data_is_compared(annotated, folder, trusted, tmp_path, command, capsys):
    same = write_lines(tmp_path / "same.jsonl", pairs(200, seed=5))
    evaluate(command, folder, trusted, "--compare-with", same, "--output", tmp_path / "one")
    assert "distributed otherwise" not in capsys.readouterr().out
    shift = read_record(tmp_path / "one").results["shift"]
    assert shift["triplets"] == 200
    assert shift["certified"] == pytest.approx(0.5, abs=0.15)
    assert shift["embeddings"]["triplets"] == [250, 200]
    # Responses that hardly differ, and no labels.
    rows = [
        {"prompt": row["prompt"], "response_a": row["response_a"], "response_b": other}
        for row in pairs(200, seed=5)
        for other in [row["response_a"] + " it"]
    ]
    other = write_lines(tmp_path / "other.jsonl", rows)
    evaluate(command, folder, trusted, "--compare-with", other, "--output", tmp_path / "two")
    assert f"The confidences on {other} are distributed otherwise" in capsys.readouterr().out
    shift = read_record(tmp_path / "two").results["shift"]
    assert shift["ks"] > shift["chance"]
    assert "Each point is a triplet" in (tmp_path / "two" / "report.html").read_text()


def test_other_texts_are_told_apart(folder, trusted, tmp_path, command, capsys):
    rows = [
        {"prompt": f"Sort {row['prompt']}", "response_a": "def sort(x):", "response_b": "lambda x:"}
        for row in pairs(100, seed=5)
    ]
    other = write_lines(tmp_path / "other.jsonl", rows)
    evaluate(command, folder, trusted, "--compare-with", other, "--output", tmp_path / "out")
    assert f"The texts of {other} are others" in capsys.readouterr().out
    embeddings = read_record(tmp_path / "out").results["shift"]["embeddings"]
    assert embeddings["auc"] > 0.95


def test_pairs_to_label_next_are_unsure_unlike_and_ready_for_people(
    folder, trusted, tmp_path, command
):
    rows = pairs(200, seed=5)
    unlabelled = [{k: v for k, v in row.items() if k != "preferred"} for row in rows]
    other = write_lines(tmp_path / "other.jsonl", unlabelled)
    out = tmp_path / "out"
    flags = ("--compare-with", other, "--suggest", 10, "--output", out)
    evaluate(command, folder, trusted, *flags)
    with (out / "to_label.csv").open(newline="") as sheet:
        suggested = [*csv.DictReader(sheet)]
    assert len({row["prompt"] for row in suggested}) == 10
    labels = Annotator.load(folder, dtype="float32").annotate([Triplet(**r) for r in unlabelled])
    confidences = sorted(label.confidence for label in labels)
    least = {label.id: label for label in labels if label.confidence <= confidences[100]}
    assert {row["id"] for row in suggested} <= least.keys()
    for row in suggested:
        assert row["annotator"] == least[row["id"]].preferred
        assert float(row["confidence"]) == pytest.approx(least[row["id"]].confidence)
    # The first is the one that it is least sure of.
    assert float(suggested[0]["confidence"]) == pytest.approx(confidences[0])
    # People fill it in, and it comes back as labels.
    with (out / "to_label.csv").open("w", newline="") as sheet:
        writer = csv.DictWriter(sheet, suggested[0])
        writer.writeheader()
        writer.writerows(row | {"preferred": "a", "reviewer": "kim"} for row in suggested)
    command(Review, "import", out / "to_label.csv", "-o", tmp_path / "more.jsonl")
    assert len(read_pairs(str(tmp_path / "more.jsonl"))) == 10


def test_suggestions_need_triplets_to_pick_from(folder, trusted, tmp_path, failure):
    flags = ("--suggest", 10, "--output", tmp_path / "out")
    assert "--compare-with" in failure(Evaluate, "annotator", folder, "--data", trusted, *flags)
