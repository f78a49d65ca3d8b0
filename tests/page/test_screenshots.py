"""Pictures of the page; those in docs/images are of the annotator of `make demo`, and written by

.venv/bin/python -m pytest tests/page/test_screenshots.py --screenshots runs/demo/annotator
"""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from cwpo_annotator.annotator import Annotator
from harness import furnished

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
DATA = ROOT / "examples" / "data" / "preferences.jsonl"
DESKTOP = {"viewport": {"width": 1200, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
MOST_BYTES = 200_000


@pytest.fixture(scope="module")
def house(request, tmp_path_factory):
    """What is shown: a service of the flag's annotator that takes jobs, and a job that is done."""
    annotator = request.config.getoption("screenshots")
    factory = Annotator.null if annotator is None else lambda: Annotator.load(annotator)
    with furnished(tmp_path_factory.mktemp("shown"), factory) as house:
        house.job = house.submit(DATA.read_bytes())
        house.start_worker()
        assert house.wait(house.job).state == "completed"
        asked = {"job_id": house.job, "below": 0.3, "most": 40}
        house.review = house.service.http.post("/reviews", json=asked).json()["id"]
        yield house


@pytest.fixture
def take(request, tmp_path):
    """`take(page, name)`: a picture of what the window shows."""
    folder = tmp_path if request.config.getoption("screenshots") is None else IMAGES

    def picture(page, name, **options):
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.png"
        page.screenshot(path=path, animations="disabled", **options)
        assert 0 < path.stat().st_size < MOST_BYTES, name

    return picture


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("playground", DESKTOP),
        ("playground-dark", {**DESKTOP, "color_scheme": "dark"}),
        ("playground-phone", {**PHONE, "device_scale_factor": 1}),
    ],
)
def test_the_playground(house, visit, take, name, options):
    page = visit(house.url, **options)
    page.get_by_role("button", name="Four answers").click()
    expect(page.locator("#ranking .letter")).to_have_count(4)
    expect(page.locator("#status")).to_have_text("ready")
    take(page, name, full_page="phone" in name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("job", DESKTOP), ("job-dark", {**DESKTOP, "color_scheme": "dark"})],
)
def test_a_job(house, visit, take, name, options):
    page = visit(f"{house.url}/#jobs/{house.job}", **options)
    expect(page.locator("#job svg")).to_be_visible()
    expect(page.locator("#status")).to_have_text("ready")
    take(page, name, full_page=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("review", DESKTOP),
        ("review-dark", {**DESKTOP, "color_scheme": "dark"}),
        ("review-phone", {**PHONE, "device_scale_factor": 1}),
    ],
)
def test_a_review(house, visit, take, name, options):
    page = visit(f"{house.url}/#review/{house.review}", **options)
    page.get_by_label("Your name").fill("Ada")
    page.get_by_role("button", name="Begin").click()
    question = page.locator(".question")
    for _ in range(6):
        expect(question).to_be_visible()
        asked = question.text_content()
        page.keyboard.press("1")
        expect(question).not_to_have_text(asked)
    expect(page.locator("#status")).to_have_text("ready")
    take(page, name, full_page="phone" in name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("annotator", DESKTOP), ("annotator-dark", {**DESKTOP, "color_scheme": "dark"})],
)
def test_the_annotator_s_card(house, visit, take, name, options):
    page = visit(f"{house.url}/#annotator", **options)
    expect(page.locator("#card .identity")).to_be_visible()
    expect(page.locator("#status")).to_have_text("ready")
    take(page, name, full_page=True)
