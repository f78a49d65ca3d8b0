from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from cwpo.errors import DatasetError
from cwpo_trainer.commands import Report
from cwpo_trainer.evaluation.comparison import Observed, compare
from cwpo_trainer.evaluation.independence import Independence
from cwpo_trainer.evaluation.judging import Judgement
from cwpo_trainer.evaluation.policy_verdict import verdict
from cwpo_trainer.report.page import duration, write_report
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
        "57.3 %",
        "61.0 %",
        "cw-dpo",
        "50 / 60 / 62 %",
        "0.400<small>(28 answers)</small>",
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
    checker.feed(write_report([run]).read_text())
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in checker.seen}
    for _, attributes in checker.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def evaluation(run, name, baseline, shift):
    """An evaluation of two policies on 40 prompts, as `cwpo evaluate policy` writes it."""
    draw = np.random.default_rng(0)
    scores = {each: draw.normal(size=40) for each in ("cw-dpo", "human", "reference")}
    scores["cw-dpo"] += shift
    observed = {
        each: Observed(
            Judgement(values, {}, {}),
            np.zeros((0, 2)),
            [f"{each} {at}" for at in range(40)],
            np.full(40, 7),
            np.ones(40, dtype=bool),
            None if each == "reference" else (np.full(40, 3.0), np.full(40, 6)),
        )
        for each, values in scores.items()
    }
    metrics, results = compare(observed, {}, beta=0.5, baseline=baseline)
    judge = {"name": "skywork", "revision": "abc", "reads": "chat"}
    rate = {"value": 0.64, "low": 0.5, "high": 0.76, "prompts": 40}
    of_policy = {"rate": rate, "wins": 20, "ties": 11, "losses": 9, "unclear": 1}
    llm = {"model": "gpt", "url": "http://x", "prompt": "chatbot", "against": "chosen"}
    llm |= {"questions": 160, "questions_kept": 0, "prompt_tokens": 9000, "completion_tokens": 321}
    results |= {
        "judge": judge,
        "llm_judge": llm | {"policies": {"cw-dpo": of_policy | {"difference": None}}},
        "verdict": verdict(metrics, Independence(labelled=[], unknown=["human"])),
    }
    answers = [
        {
            "prompt": f"prompt {at}",
            "answers": {
                each: {"answer": f"{each} {at}", "score": values[at]}
                for each, values in scores.items()
            },
        }
        for at in range(40)
    ]
    output(run, "evaluate-policy", name, results, samples=answers)
    return metrics


def test_evaluations_of_several_folders_are_on_one_page_with_their_intervals(
    tmp_path, command, capsys
):
    steps = [{"step": i, "loss": 9, "unweighted_loss": 0.7 - 0.01 * i} for i in range(1, 31)]
    output(tmp_path / "a", "align", "cw-dpo", {"pairs": 1234}, steps)
    near = evaluation(tmp_path / "a", "near", "reference", 0.1)["cw-dpo"].comparison.win_share
    far = evaluation(tmp_path / "b", "far", "human", 2)["cw-dpo"].comparison.win_share
    path = tmp_path / "pages" / "all.html"
    command(Report, tmp_path / "a", tmp_path / "b", "-o", path)
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    for text in (
        "<h1>a · b</h1>",
        "a/near",
        "b/far",
        "judge skywork",
        "LLM judge gpt against chosen",
        "9,321 tokens",
        "cw-dpo is better than human",
        "Who labelled the training data of human is not known",
        f'<span class="shown-good">{100 * far.value:+.1f}</span>',
        f"<small>{100 * far.low:+.1f} to {100 * far.high:+.1f}</small>",
        f'<span class="">{100 * near.value:+.1f}</span>',
        "64.0 %<small>50.0 % to 76.0 %</small>",
        "1,234",
    ):
        assert text in page, text
    # GRA and differences of both; of each a gap and a divergence; the loss of the training.
    assert sum(tag == "figure" for tag, _ in checker.seen) == 2 + 2 * 2 + 1
    report = json.loads(path.with_suffix(".json").read_text())
    assert [run["name"] for run in report["runs"]] == ["a/cw-dpo", "a/near", "b/far"]
    (training,) = report["trainings"]
    assert (training["steps"], training["pairs"]) == (30, 1234)
    assert training["loss"] == pytest.approx((0.40 + 0.41 + 0.42) / 3)
    rows = {(row["evaluation"], row["policy"]): row for row in report["policies"]}
    assert len(rows) == 6
    assert rows["b/far", "cw-dpo"]["metrics"]["comparison"]["win_share"] == far.model_dump()
    assert rows["b/far", "human"]["is_baseline"]
    assert rows["a/near", "reference"]["metrics"] is None


def test_the_page_of_several_runs_needs_a_name(tmp_path, failure):
    assert "-o page.html" in failure(Report, tmp_path, tmp_path / "b")


@pytest.mark.parametrize(("seconds", "text"), [(8, "8 s"), (427, "7 min"), (7500, "2 h 5 min")])
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_texts_are_escaped(run):
    page = write_report([run]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;why&lt;/b&gt;" in page


def test_a_dataset_alone_is_enough(tmp_path):
    source = write_lines(tmp_path / "weighted.jsonl", weighted(20))
    assert "Confidence of the annotator" in write_report([tmp_path]).read_text()
    (tmp_path / "other").mkdir()
    assert "20" in write_report([tmp_path / "other"], source).read_text()


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json and no weighted dataset"):
        write_report([tmp_path])
    with pytest.raises(DatasetError, match="no such folder"):
        write_report([tmp_path / "nowhere"])


def test_an_unreadable_record_is_said(run):
    (run / "sft" / "run.json").write_text(json.dumps({"kind": "sft"}))
    with pytest.raises(DatasetError, match=r"sft/run\.json"):
        write_report([run])
