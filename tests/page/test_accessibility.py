"""For everybody: what axe-core finds, a phone's width, light and dark."""

import pytest
from playwright.sync_api import expect

from harness import furnished

VIEWS = ["playground", "jobs", "review", "annotator"]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def house(tmp_path_factory, measured):
    """A service with a job that is done, and a review of it that has begun."""
    rows = [
        {"id": f"r{at}", "prompt": f"question {at}", "response_a": "yes " * 40, "response_b": "no"}
        for at in range(60)
    ]
    with furnished(tmp_path_factory.mktemp("house"), measured) as house:
        house.job = house.submit(rows)
        house.work()
        asked = {"job_id": house.job, "below": 0.9}
        house.review = house.service.http.post("/reviews", json=asked).json()["id"]
        said = {"reviewer": "Bob", "number": 3, "preferred": "a"}
        house.service.http.post(f"/reviews/{house.review}/answers", json=said)
        yield house


def open_view(house, visit, view, **options):
    """The page, once the view is complete."""
    places = {"jobs": f"jobs/{house.job}", "review": f"review/{house.review}"}
    page = visit(f"{house.url}/#{places.get(view, view)}", **options)
    if view == "playground":
        page.get_by_role("button", name="Four answers").click()
        expect(page.locator("#ranking .letter")).to_have_count(4)
    if view == "jobs":
        page.get_by_text("Least confident", exact=True).click()
        page.get_by_text("Parts, to read one by one").click()
        page.get_by_text("Options").click()
    if view == "review":
        page.get_by_label("Your name").fill("Ada")
        page.get_by_role("button", name="Begin").click()
        expect(page.locator(".question")).to_be_visible()
    if view == "annotator":
        expect(page.locator("#card .plot")).to_be_visible()
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(house, visit, inaccessible, view, scheme):
    # axe-core makes HTML of text, which the page's own policy forbids.
    page = open_view(house, visit, view, color_scheme=scheme, bypass_csp=True)
    assert inaccessible(page) == []


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_needs_no_scrolling_to_the_side(house, visit, view):
    page = open_view(house, visit, view, viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_parts_of_the_page_are_links_that_move_the_focus(house, visit):
    page = visit(house.url)
    page.get_by_role("navigation").get_by_role("link", name="Annotator").click()
    expect(page.get_by_role("heading", name="Annotator", level=1)).to_be_focused()
    assert page.title() == "Annotator · cwpo"
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("Which answer is better?")
