"""For everybody: what axe-core finds, a phone's width, light and dark."""

import pytest
from playwright.sync_api import expect

VIEWS = ["playground", "annotator"]
PHONE = {"width": 390, "height": 844}


def shown(page, view):
    """The page, once the view is complete."""
    if view == "playground":
        page.get_by_role("button", name="Four answers").click()
        expect(page.locator("#ranking .letter")).to_have_count(4)
    if view == "annotator":
        expect(page.locator("#card .plot")).to_be_visible()
    expect(page.locator(f"#{view} h1")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(service, visit, inaccessible, view, scheme):
    # axe-core makes HTML of text, which the page's own policy forbids.
    page = visit(f"{service.url}/#{view}", color_scheme=scheme, bypass_csp=True)
    shown(page, view)
    assert inaccessible(page) == []


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_needs_no_scrolling_to_the_side(service, visit, view):
    page = visit(f"{service.url}/#{view}", viewport=PHONE, has_touch=True, is_mobile=True)
    shown(page, view)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_parts_of_the_page_are_links_that_move_the_focus(service, visit):
    page = visit(service.url)
    page.get_by_role("navigation").get_by_role("link", name="Annotator").click()
    expect(page.get_by_role("heading", name="Annotator", level=1)).to_be_focused()
    assert page.title() == "Annotator · cwpo"
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("Which answer is better?")
