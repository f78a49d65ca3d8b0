"""Pictures of the page; those in docs/images are of the annotator of `make demo`, and written by

.venv/bin/python -m pytest tests/page/test_screenshots.py --screenshots runs/demo/annotator
"""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from cwpo_annotator.annotator import Annotator
from harness import serving

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DESKTOP = {"viewport": {"width": 1200, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
MOST_BYTES = 200_000


@pytest.fixture(scope="module")
def shown(request, service):
    """The service to be shown: that of the flag, else the one that the other tests have."""
    folder = request.config.getoption("screenshots")
    if folder is None:
        yield service
        return
    with serving(lambda: Annotator.load(folder)) as real:
        triplets = [
            {"prompt": f"Why is {at} a number?", "response_a": "It counts.", "response_b": f"{at}"}
            for at in range(240)
        ]
        real.http.post("/annotate", json={"triplets": triplets})
        yield real


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
def test_the_playground(shown, visit, take, name, options):
    page = visit(shown.url, **options)
    page.get_by_role("button", name="Four answers").click()
    expect(page.locator("#ranking .letter")).to_have_count(4)
    expect(page.locator("#status")).to_have_text("ready")
    take(page, name, full_page="phone" in name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("annotator", DESKTOP), ("annotator-dark", {**DESKTOP, "color_scheme": "dark"})],
)
def test_the_annotator_s_card(shown, visit, take, name, options):
    page = visit(f"{shown.url}/#annotator", **options)
    expect(page.locator("#card .identity")).to_be_visible()
    expect(page.locator("#status")).to_have_text("ready")
    take(page, name, full_page=True)
