"""Review on the page: two answers side by side, by keys and by hand, several people at once."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

from harness import TIMEOUT, furnished

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A service with a job that is done."""
    rows = [
        {"id": f"r{at}", "prompt": f"{HOSTILE} {at}", "response_a": "yes", "response_b": "no"}
        for at in range(40)
    ]
    with furnished(tmp_path_factory.mktemp("house")) as house:
        house.job = house.submit(rows)
        house.work()
        yield house


@pytest.fixture
def review(house, visit):
    """`review()`: the page of a new review of ten rows, made on the page; its reviewer is Ada."""

    def create(answers=1):
        page = visit(f"{house.url}/review")
        page.get_by_label("Confidence below").fill("0.9")
        page.get_by_label("Rows, at most").fill("10")
        page.get_by_label("People who answer each row").fill(str(answers))
        page.get_by_role("button", name="Select rows").click()
        begin(page, "Ada")
        return page

    return create


def begin(page, name):
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Begin").click()
    expect(page.locator(".question")).to_be_visible()


def rows_done(page, number):
    bar = page.get_by_role("progressbar", name="Rows done")
    expect(bar).to_have_attribute("aria-valuenow", str(number))


def answers(house, page):
    review_id = page.url.rsplit("/", 1)[1]
    text = house.service.http.get(f"/reviews/{review_id}/answers").text
    return [json.loads(line) for line in text.splitlines()]


def test_the_keys_answer_and_undo(house, review):
    page = review()
    chosen = []
    for done, key in enumerate(["1", "2", "0"]):
        sides = page.locator(".answer .text").all_text_contents()
        question = page.locator(".question").text_content()
        chosen.append({"1": sides[0], "2": sides[1], "0": "tie"}[key])
        page.keyboard.press(key)
        rows_done(page, done + 1)
        expect(page.locator(".question")).not_to_have_text(question)
    given = sorted(answers(house, page), key=lambda each: each["answered_at"])
    texts = {"a": "yes", "b": "no", "tie": "tie"}
    assert [texts[each["preferred"]] for each in given] == chosen
    page.keyboard.press("u")
    rows_done(page, 2)
    expect(page.locator(".question")).to_have_text(question)
    assert len(answers(house, page)) == 2


def test_buttons_do_the_same(house, review):
    page = review()
    page.get_by_role("button", name="First is better").click()
    rows_done(page, 1)
    page.get_by_role("button", name="Second is better").click()
    rows_done(page, 2)
    page.get_by_role("button", name="No difference").click()
    rows_done(page, 3)
    page.get_by_role("button", name="Undo").click()
    rows_done(page, 2)


def test_two_people_get_different_rows_until_none_is_left(house, review, visit):
    page = review()
    other = visit(page.url)
    begin(other, "Bob")
    for person in (page, other) * 5:
        question = person.locator(".question").text_content()
        person.keyboard.press("1")
        expect(person.get_by_text(question, exact=True)).to_have_count(0)
    expect(other.get_by_text("Nothing is left for you")).to_be_visible()
    given = answers(house, page)
    assert len({each["id"] for each in given}) == len(given) == 10
    people = other.get_by_role("list", name="Answers of each person")
    expect(people.get_by_role("listitem")).to_have_text(["Ada: 5", "Bob: 5"])


def test_the_answers_are_downloaded(house, review):
    page = review()
    page.keyboard.press("2")
    rows_done(page, 1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the answers").click()
    (line,) = download.value.path().read_text().splitlines()
    assert json.loads(line)["reviewer"] == "Ada"


def test_the_list_says_how_rows_were_chosen(review):
    page = review()
    page.get_by_role("link", name="All reviews").click()
    newest = page.locator("#review-list li").first
    expect(newest).to_contain_text("10 rows below 0.9, drawn at random: the annotator has no")


def test_texts_are_never_html(review):
    page = review()
    expect(page.locator(".question")).to_contain_text(HOSTILE)
    assert page.locator("#review img").count() == 0
    assert page.title() == "Review · cwpo"


def test_keys_are_for_the_page_only_while_nothing_is_typed(house, review):
    page = review()
    page.get_by_role("link", name="Playground").click()
    page.get_by_role("textbox", name="Prompt").press_sequentially("1 2 0 u")
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value(
        "How do I keep a supermarket basil plant alive?1 2 0 u"
    )
    page.go_back()
    rows_done(page, 0)


def test_undo_without_an_answer_is_explained(review):
    page = review()
    page.keyboard.press("u")
    expect(page.locator("#session").get_by_role("alert")).to_contain_text("has given no answer")
    page.complaints.expect("409")


def test_nothing_so_uncertain_is_explained(house, visit):
    page = visit(f"{house.url}/#review")
    page.get_by_label("Confidence below").fill("0.01")
    page.get_by_role("button", name="Select rows").click()
    expect(page.locator("#review-note")).to_contain_text("no row of job")
    page.complaints.expect("409")


def test_an_unknown_review_is_named(house, visit):
    page = visit(f"{house.url}/#review/review-{'0' * 24}")
    expect(page.locator("#review-problem")).to_contain_text("there is no review")
    page.complaints.expect("404")


def test_a_service_that_went_away_is_named_and_the_row_stays(tmp_path, visit):
    rows = [{"prompt": f"p{at}", "response_a": "yes", "response_b": "no"} for at in range(20)]
    with furnished(tmp_path) as own:
        job = own.submit(rows)
        own.work()
        made = own.service.http.post("/reviews", json={"job_id": job, "below": 1}).json()
        page = visit(f"{own.url}/#review/{made['id']}")
        begin(page, "Ada")
    page.keyboard.press("1")
    expect(page.locator("#session").get_by_role("alert")).to_contain_text(
        "does not answer", timeout=1000 * TIMEOUT
    )
    expect(page.locator(".question")).to_be_visible()
    page.complaints.expect("ERR_CONNECTION_REFUSED")
