"""The service's page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from cwpo.types import Certificate, ModelRef
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.checkpoint import CalibrationBin, Card, EncodingSpec, HeldOut
from harness import RunningService, serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP = {"width": 1280, "height": 860}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for each file: Playwright occupies the event loop of the thread while it runs."""
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            # No other server is found, so what the page shows came from the service.
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


class Complaints:
    """Errors and warnings in the console; the test fails if any is left that it does not expect."""

    def __init__(self, page: Page) -> None:
        self.found: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.found.append(f"uncaught: {error}"))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.found.append(message.text)

    def expect(self, text: str) -> None:
        """Take back those with this text, of which there is at least one."""
        others = [each for each in self.found if text not in each]
        assert len(others) < len(self.found), f"no complaint of {text!r} in {self.found}"
        self.found = others


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, **options)`: a page of a fresh browser context, whose console has to stay empty.

    `page.complaints` are the messages in it.
    """
    contexts, pages = [], []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": DESKTOP, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.complaints = Complaints(page)
        pages.append(page)
        page.goto(url)
        return page

    yield open_page
    found = [complaint for page in pages for complaint in page.complaints.found]
    for context in contexts:
        context.close()
    assert found == []


@pytest.fixture
def inaccessible():
    """`inaccessible(page)`: what axe-core finds that hinders people, seriously or worse."""

    def serious(page: Page) -> list[str]:
        found = Axe().run(page).response["violations"]
        return [
            f"{each['id']}: {[node['html'] for node in each['nodes']]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    return serious


def measured_annotator() -> Annotator:
    """The null annotator with all that a card can record."""
    bins = [
        CalibrationBin(
            pairs=40,
            mean_confidence=0.1 * at + 0.04,
            mean_calibrated_confidence=0.08 * at + 0.03,
            accuracy=0.5 + 0.045 * at,
        )
        for at in range(10)
    ]
    card = Card(
        base_model="acme/base-135m",
        objective="bt",
        encoding=EncodingSpec(max_length=512, pad_token="<pad>"),
        data_fingerprint="af3584ec724988f8",
        labelled_pairs=2107,
        held_out=HeldOut(
            pairs=400,
            accuracy=0.743,
            mean_confidence=0.52,
            ece=0.061,
            calibrated_ece=0.018,
            bins=bins,
        ),
        temperature=1.4,
    )
    certificate = Certificate(
        max_error=0.1, delta=0.05, threshold=0.62, coverage=0.41, pairs=164, errors=9
    )
    return Annotator(
        NullEncoder(),
        NullBackend(),
        ModelRef(name="helpfulness", revision="0f7d2c1b9a3e"),
        temperature=1.4,
        confidence_quantiles=[at / 10 for at in range(11)],
        certificates=[certificate],
        card=card,
    )


@pytest.fixture(scope="session")
def measured():
    """`measured()`: an annotator of which everything is known."""
    return measured_annotator


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with an annotator of which everything is known."""
    with serving(measured_annotator) as service:
        yield service
