from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from cwpo.errors import DatasetError
from cwpo_trainer.commands import Report
from cwpo_trainer.report.page import write_report
from cwpo_trainer.run.folder import new_run_folder

from ..samples import weighted, write_lines

BINS = [
    {"pairs": 10, "lowest": 0.1 * i, "highest": 0.1 * i + 0.1, "mean_confidence": 0.1 * i + 0.05}
    | {"accuracy": 0.5 + 0.05 * i}
    for i in range(10)
]
METRICS = {
    "pairs": 100,
    "failed": 0,
    "accuracy": 0.725,
    "mean_confidence": 0.5,
    "ece": 0.031,
    "confidence_quantiles": [0.1 * i for i in range(11)],
    "bins": BINS,
}
POLICY = {
    "preference_accuracy": 0.61,
    "implicit_margin": 0.2,
    "win_share": 0.573,
    "win_share_thirds": [0.5, 0.6, 0.62],
    "mean_score": 0.4,
    "scored": 28,
    "unscored": {"empty_response": 2},
}


class Checker(HTMLParser):
    """Collects tags, and fails on one that is never closed."""

    void = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def output(run, kind, name, results, log=(), samples=()):
    with new_run_folder(kind, run / name, {"model": "<m>", "seed": 1}) as made:
        made.results |= results
        if log:
            write_lines(made.path / "training.jsonl", log)
        if samples:
            write_lines(made.path / "samples.jsonl", samples)


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "demo"
    steps = [{"step": i, "loss": 0.7 - 0.01 * i, "lr": 1e-4} for i in range(1, 20)]
    more = [line | {"unweighted_loss": line["loss"], "rewards/margins": 0.1} for line in steps]
    output(run, "train-annotator", "annotator", {"held_out": METRICS, "temperature": 0.25}, steps)
    output(run, "sft", "sft", {"pairs": 9}, steps)
    output(run, "align", "cw-dpo", {"pairs": 9}, more)
    output(run, "align", "dpo", {"pairs": 9}, more)
    answers = {
        "reference": {"answer": "plain", "score": 0.1},
        "cw-dpo": {"answer": "<script>alert(1)</script>", "score": None, "problem": "too_long"},
    }
    output(
        run,
        "evaluate-policy",
        "evaluation",
        {"pairs": 90, "prompts": 30, "reference_mean_score": 0.2, "policies": {"cw-dpo": POLICY}},
        samples=[
            {"prompt": "<b>why</b>", "answers": answers},
            {"prompt": [{"role": "user", "content": "chat & more"}], "answers": answers},
        ],
    )
    write_lines(run / "weighted.jsonl", weighted(50))
    return run


def test_the_page_tells_the_whole_run(run, command, capsys):
    command(Report, run)
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    for text in (
        "72.5 %",
        "57.3 %\n          ± 9.0",
        "61.0 %",
        "cw-dpo",
        "50 / 60 / 62 %",
        "0.400 (28 answers)",
        "too_long</span>",
        "Supervised fine-tuning",
        "chat",
        "the temperature 0.25",
    ):
        assert text in page
    assert sum(tag == "figure" for tag, _ in checker.seen) == 6
    assert sum(tag == "svg" for tag, _ in checker.seen) == 6


def test_the_page_needs_nothing_from_elsewhere(run):
    checker = Checker()
    checker.feed(write_report(run).read_text())
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in checker.seen}
    for _, attributes in checker.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_texts_are_escaped(run):
    page = write_report(run).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;why&lt;/b&gt;" in page


def test_a_dataset_alone_is_enough(tmp_path):
    source = write_lines(tmp_path / "weighted.jsonl", weighted(20))
    assert "Confidence of the annotator" in write_report(tmp_path).read_text()
    (tmp_path / "other").mkdir()
    assert "20" in write_report(tmp_path / "other", source).read_text()


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json and no weighted dataset"):
        write_report(tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_an_unreadable_record_is_said(run):
    (run / "sft" / "run.json").write_text(json.dumps({"kind": "sft"}))
    with pytest.raises(DatasetError, match=r"sft/run\.json"):
        write_report(run)
