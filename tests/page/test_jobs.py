"""Jobs on the page: upload, progress, cancel, resume, what they made, and what goes wrong."""

from __future__ import annotations

import json
import re
import threading
from hashlib import sha256

import pytest
from playwright.sync_api import expect

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from harness import TIMEOUT, certified_annotator, furnished

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
ROWS = [
    {"id": f"r{at}", "prompt": f"question {at} {HOSTILE}", "response_a": "yes", "response_b": "no"}
    for at in range(300)
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A service that takes jobs, and a worker."""
    with furnished(tmp_path_factory.mktemp("house"), certified_annotator) as house:
        house.start_worker()
        yield house


def choose(page, *files):
    named = [{"name": name, "mimeType": "", "buffer": data} for name, data in files]
    page.get_by_label("Files of triplets").set_input_files(named)


def start(page, *files):
    choose(page, *files)
    page.get_by_role("button", name="Start").click()


def expect_state(page, state):
    pill = page.locator("#job .pill")
    expect(pill).to_have_text(state, timeout=1000 * TIMEOUT)


def test_a_file_becomes_a_dataset(house, visit):
    page = visit(f"{house.url}/#jobs")
    start(page, ("triplets.jsonl", lines([*ROWS, {"id": "bad", "prompt": "x"}])))
    expect_state(page, "done, rows rejected")
    expect(page.get_by_role("progressbar", name="Progress")).to_have_attribute(
        "aria-valuenow", "100"
    )
    job = page.locator("#job")
    expect(job).to_contain_text("301 of 301 rows")
    expect(job).to_contain_text("1 rejected")
    expect(page.locator("#job-list .pill").first).to_have_text("done, rows rejected")
    job_id = page.url.rsplit("/", 1)[1]
    labels = house.results(job_id)
    with page.expect_download() as jsonl:
        job.get_by_role("link", name="JSONL").click()
    assert [json.loads(line) for line in jsonl.value.path().read_text().splitlines()] == labels
    with page.expect_download() as rejected:
        job.get_by_role("link", name="1 rejected row").click()
    assert json.loads(rejected.value.path().read_text())["id"] == "bad"
    page.get_by_text("Parts, to read one by one").click()
    with page.expect_download() as part:
        job.get_by_role("link", name="part-00000000.parquet").click()
    assert part.value.suggested_filename == f"{job_id}.part-00000000.parquet"


def test_the_confidences_are_those_of_the_dataset(house, visit):
    job_id = house.submit(ROWS)
    labels = house.wait(job_id) and house.results(job_id)
    page = visit(f"{house.url}/#jobs/{job_id}")
    expect(page.locator("#job svg rect")).to_have_count(20)
    counts = [0] * 20
    for row in labels:
        counts[min(19, int(row["confidence"] * 20))] += 1
    page.locator("#job").get_by_text("The figures").click()
    shown = page.locator("#job tbody tr td:nth-child(2)").all_text_contents()
    assert shown == [str(count) for count in counts]
    by_confidence = sorted(labels, key=lambda row: row["confidence"])
    for title, expected in (
        ("Most confident", by_confidence[::-1]),
        ("Least confident", by_confidence),
    ):
        page.get_by_text(title, exact=True).click()
        group = page.locator("details.extremes", has_text=title)
        prompts = group.locator(".prompt").all_text_contents()
        assert prompts == [row["prompt"] for row in expected[:5]]
        chosen = group.locator(".chosen").all_text_contents()
        assert chosen == [f"chosen{row['chosen']}" for row in expected[:5]]
    assert page.locator("#job img").count() == 0
    assert page.title() == "Jobs · cwpo"


def test_options_are_sent(house, visit):
    page = visit(f"{house.url}/#jobs")
    page.get_by_text("Options").click()
    page.get_by_label("Rows with several responses").select_option("best_worst")
    page.get_by_label("Texts that are too long").select_option("prompt_left")
    page.get_by_label("Certified labels").select_option("0.1")
    start(page, ("rows.jsonl", lines([{"prompt": "p", "responses": ["one", "two", "three"]}])))
    expect_state(page, "done")
    job = house.ledger.get(page.url.rsplit("/", 1)[1], owner=None)
    assert (job.pairs, job.truncation, job.max_error) == ("best_worst", "prompt_left", 0.1)


def test_several_files_are_one_job(house, visit):
    page = visit(f"{house.url}/#jobs")
    start(page, ("one.jsonl", lines(ROWS[:10])), ("two.jsonl", lines(ROWS[10:30])))
    expect_state(page, "done")
    expect(page.locator("#job")).to_contain_text("30 of 30 rows")


class Gate(NullBackend):
    """Scores once it is open."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def score_pairs(self, pairs):
        assert self.opened.wait(TIMEOUT)
        return super().score_pairs(pairs)


@pytest.fixture
def gated(tmp_path):
    """A house whose annotator scores nothing until its gate is opened, and the gate."""
    gate = Gate()
    model = Annotator.null().model
    try:
        with furnished(tmp_path, lambda: Annotator(NullEncoder(), gate, model)) as house:
            yield house, gate
    finally:
        gate.opened.set()


def test_a_job_is_watched_cancelled_resumed_and_deleted(gated, visit):
    house, gate = gated
    job_id = house.submit(ROWS)
    page = visit(f"{house.url}/#jobs/{job_id}")
    expect_state(page, "reading")
    house.plan(job_id)
    expect_state(page, "queued")
    page.get_by_role("button", name="Cancel").click()
    house.start_worker()
    expect_state(page, "cancelled")
    gate.opened.set()
    page.get_by_role("button", name="Resume").click()
    expect_state(page, "done")
    expect(page.locator("#job-list .pill")).to_have_text("done")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete it with its results?").click()
    expect(page.locator("#job-list")).to_contain_text("None yet")
    assert house.ledger.list(owner=None, limit=1).jobs == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("photo.png", b"x", "choose a .jsonl, .jsonl.gz or .parquet file"),
        ("triplets.parquet", b"no parquet", "Parquet"),
    ],
)
def test_a_wrong_file_is_explained(house, visit, name, data, message):
    page = visit(f"{house.url}/#jobs")
    start(page, (name, data))
    place = page.locator("#upload-state, #job .problem").filter(has_text=re.compile(message))
    expect(place.first).to_be_visible(timeout=1000 * TIMEOUT)
    page.complaints.found = [each for each in page.complaints.found if "status of 4" not in each]


def test_no_file_is_named(house, visit):
    page = visit(f"{house.url}/#jobs")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#upload-state")).to_contain_text("Choose a file first")


def test_an_unknown_job_is_named(house, visit):
    page = visit(f"{house.url}/#jobs/job-{'0' * 24}")
    expect(page.locator("#job").get_by_role("alert")).to_contain_text("there is no job")
    page.complaints.expect("404")


def test_a_service_without_a_queue_says_so(service, visit):
    page = visit(f"{service.url}/#jobs")
    expect(page.locator("#jobs-problem")).to_contain_text("has no job queue")
    page.complaints.expect("503")


def test_downloads_work_with_a_key(tmp_path, visit):
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{sha256(b'secret').hexdigest()}\n")
    with furnished(tmp_path, api_key="secret", api_keys_file=keys) as house:
        house.start_worker()
        page = visit(f"{house.url}/#jobs")
        page.get_by_role("dialog").get_by_label("Key", exact=True).fill("secret")
        page.get_by_role("button", name="Continue").click()
        start(page, ("triplets.jsonl", lines(ROWS[:20])))
        expect_state(page, "done")
        with page.expect_download() as jsonl:
            page.locator("#job").get_by_role("link", name="JSONL").click()
        assert len(jsonl.value.path().read_text().splitlines()) == 20
        page.complaints.expect("401")
