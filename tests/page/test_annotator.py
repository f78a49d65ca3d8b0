"""The annotator's card."""

import pytest
from playwright.sync_api import expect

from harness import serving


def test_the_card_tells_what_is_known(service, visit):
    page = visit(f"{service.url}/#annotator")
    card = page.locator("#card")
    for text in (
        "helpfulness",
        "0f7d2c1b9a3e",
        "acme/base-135m",
        "Bradley–Terry",
        "2,107 labelled pairs",
        "74.3 %",
        "0.061",
        "0.018",
        "At most 10 % of labels with a confidence above 0.62 are wrong",
        "with a probability of 95 %",
        "41 % of the pairs",
        "tokens, prompt and response together",
    ):
        expect(card).to_contain_text(text)


def test_the_plot_shows_each_bin_where_it_belongs(service, visit):
    page = visit(f"{service.url}/#annotator")
    raw = page.locator(".plot circle.raw")
    expect(raw).to_have_count(10)
    expect(page.locator(".plot circle.calibrated")).to_have_count(10)
    # Bin 9 promises (1 + 0.94) / 2 and keeps 0.905: right of the line, and so below it.
    first, last = raw.nth(0), raw.nth(9)
    x, y = (float(last.get_attribute(name)) for name in ("cx", "cy"))
    x0, y0 = (float(first.get_attribute(name)) for name in ("cx", "cy"))
    width, height = 320 - 44 - 10, 320 - 40 - 10
    assert (x - x0) / width == pytest.approx((0.97 - 0.52) / 0.5)
    assert (y0 - y) / height == pytest.approx((0.905 - 0.5) / 0.5)
    page.get_by_text("The figures").click()
    assert page.locator("table tbody tr").last.locator("td").all_text_contents() == [
        "40",
        "97.0 %",
        "87.5 %",
        "90.5 %",
    ]


def test_drift_is_known_after_enough_annotations(service, visit):
    page = visit(f"{service.url}/#annotator")
    expect(page.locator("#card")).to_contain_text("Known after 200 annotations")
    triplets = [{"prompt": f"q{at}", "response_a": "yes", "response_b": "no"} for at in range(300)]
    service.http.post("/annotate", json={"triplets": triplets})
    distance = service.http.get("/model/card").json()["drift"]["distance"]
    page.reload()
    expect(page.locator(".gauge strong")).to_have_text(f"{distance:.3f}")
    assert distance > 0.1
    expect(page.locator("#card")).to_contain_text("They do not hold at present: the last 300")


def test_an_annotator_from_elsewhere_has_gaps_that_are_named(visit):
    with serving() as own:
        page = visit(f"{own.url}/#annotator")
        card = page.locator("#card")
        expect(card).to_contain_text("No accuracy is recorded")
        expect(card).to_contain_text("No plot is recorded")
        expect(card).to_contain_text("no quantiles of confidence")
        expect(card).to_contain_text("--certify")
