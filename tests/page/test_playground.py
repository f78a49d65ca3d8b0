"""The playground: every control, by mouse and by keyboard, and what goes wrong."""

import re
import threading
from contextlib import suppress

import httpx2
import pytest
from playwright.sync_api import expect

from cwpo import RankItem, Triplet
from cwpo_annotator.annotator import Annotator
from harness import TIMEOUT, labels_of, serving

HOSTILE = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'


def write(page, prompt, *responses):
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    while page.get_by_label(re.compile("^Response ")).count() < len(responses):
        page.get_by_role("button", name="Add a response").click()
    for letter, text in zip("ABCDEFG", responses, strict=False):
        page.get_by_label(f"Response {letter}", exact=True).fill(text)


def order(page):
    """The letters of the result, best first, once it is there."""
    expect(page.locator("#ranking .verdict")).to_be_visible()
    return page.locator("#ranking .letter").all_text_contents()


def test_two_responses_get_the_annotator_s_label(service, visit):
    page = visit(service.url)
    write(page, "question", "one", "two")
    page.get_by_role("button", name="Compare").click()
    (label,) = labels_of([Triplet(prompt="question", response_a="one", response_b="two")])
    better = label.preferred.upper()
    assert order(page) == sorted("AB", key=lambda letter: letter != better)
    expect(page.locator(".verdict")).to_contain_text(f"{better} is better")
    expect(page.locator(".confidence .value")).to_have_text(f"{label.confidence:.2f}")
    scores = [score.replace("−", "-") for score in page.locator(".score").all_text_contents()]
    assert scores == sorted(
        (f"{label.score_a:.2f}", f"{label.score_b:.2f}"), key=float, reverse=True
    )


def test_several_responses_are_ranked(service, visit):
    page = visit(service.url)
    responses = ["one", "two", "three", "four"]
    write(page, "question", *responses)
    page.get_by_role("button", name="Compare").click()
    (ranking,) = Annotator.null().rank([RankItem(prompt="question", responses=responses)])
    assert order(page) == ["ABCD"[at] for at in ranking.order]
    values = page.locator(".confidence .value").all_text_contents()
    assert values == [f"{value:.2f}" for value in ranking.confidence]


def test_equal_responses_are_no_better_than_each_other(service, visit):
    page = visit(service.url)
    write(page, "question", "same", "same")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".verdict")).to_contain_text("No difference")


def test_responses_are_added_and_removed_and_never_fewer_than_two(service, visit):
    page = visit(service.url)
    write(page, "question", "one", "two", "three")
    page.get_by_role("button", name="Remove response B").click()
    assert [field.input_value() for field in page.get_by_label(re.compile("^Response ")).all()] == [
        "one",
        "three",
    ]
    expect(page.get_by_role("button", name="Remove response A")).to_be_hidden()


def test_an_example_is_a_click(service, visit):
    page = visit(service.url)
    page.get_by_role("button", name="Four answers").click()
    assert sorted(order(page)) == ["A", "B", "C", "D"]
    prompt = page.get_by_role("textbox", name="Prompt")
    expect(prompt).to_have_value(re.compile("credit for my work"))


def test_the_keyboard_is_enough(service, visit):
    page = visit(service.url)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.press("Control+A")
    page.keyboard.type("typed question")
    page.keyboard.press("Control+Enter")
    assert len(order(page)) == 2
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("typed question")


def test_text_from_triplets_is_never_html(service, visit):
    page = visit(service.url)
    write(page, HOSTILE, HOSTILE, f"{HOSTILE}!")
    page.get_by_role("button", name="Compare").click()
    order(page)
    assert HOSTILE in page.locator("#ranking .text").all_text_contents()
    assert page.locator("#ranking img, #ranking script").count() == 0
    assert page.title() == "Playground · cwpo"


def test_the_browser_itself_forbids_html_of_text(service, visit):
    page = visit(service.url)
    page.wait_for_load_state("networkidle")
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } }"
    )
    assert refused
    page.complaints.expect("TrustedHTML")


def test_an_empty_response_is_explained(service, visit):
    page = visit(service.url)
    write(page, "question", "one", "")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#ranking").get_by_role("alert")).to_contain_text("empty")


def test_a_service_that_went_away_is_named(visit):
    with serving() as own:
        page = visit(own.url)
        expect(page.get_by_text("ready", exact=True)).to_be_visible()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#ranking").get_by_role("alert")).to_contain_text("does not answer")
    page.complaints.expect("ERR_CONNECTION_REFUSED")


def test_a_service_that_is_loading_says_so(visit):
    gate = threading.Event()

    def slow():
        assert gate.wait(TIMEOUT)
        return Annotator.null()

    with serving(slow, wait=False) as own:
        try:
            while not answers(own):
                assert own.thread.is_alive()
            page = visit(own.url)
            expect(page.locator("#status")).to_have_text("loading")
            page.get_by_role("button", name="Compare").click()
            expect(page.locator("#ranking").get_by_role("alert")).to_contain_text("is loading")
            page.complaints.expect("503")
        finally:
            gate.set()


def answers(service):
    with suppress(httpx2.TransportError):
        return service.http.get("/health/live").status_code


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 64])
def test_no_more_responses_than_the_service_takes(service, visit, count):
    page = visit(service.url)
    add = page.get_by_role("button", name="Add a response")
    while page.get_by_label(re.compile("^Response ")).count() < count:
        add.click()
    assert add.is_disabled() == (count == 64)
