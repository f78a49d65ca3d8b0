"""What the page may do, and for whom."""

from hashlib import sha256

import pytest
from playwright.sync_api import expect

from cwpo_annotator.annotator import Annotator
from harness import serving

KEY = "s3cret-key"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service that wants a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"reader:{sha256(KEY.encode()).hexdigest()}\n")
    with serving(Annotator.null, api_keys_file=keys) as service:
        yield service


def compare(page):
    page.get_by_role("button", name="Compare").click()


def give(page, key):
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Continue").click()


def test_the_key_is_asked_for_once_and_kept_in_memory_only(guarded, visit):
    page = visit(guarded.url)
    compare(page)
    give(page, KEY)
    expect(page.locator(".verdict")).to_be_visible()
    page.get_by_role("button", name="Four answers").click()
    expect(page.locator("#ranking .letter")).to_have_count(4)
    expect(page.get_by_role("dialog")).to_be_hidden()
    kept = page.evaluate(
        "() => [JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie,"
        " location.href, document.querySelector('#key').value].join()"
    )
    assert KEY not in kept
    page.complaints.expect("401")
    page.reload()
    compare(page)
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    page.complaints.expect("401")


def test_a_wrong_key_is_named_and_asked_for_again(guarded, visit):
    page = visit(guarded.url)
    compare(page)
    give(page, "wrong")
    expect(page.get_by_role("alert")).to_contain_text("does not know this key")
    give(page, KEY)
    expect(page.locator(".verdict")).to_be_visible()
    page.complaints.expect("401")


@pytest.mark.parametrize("leave", ["Not now", "Escape"])
def test_without_a_key_the_page_says_what_is_missing(guarded, visit, leave):
    page = visit(guarded.url)
    compare(page)
    if leave == "Escape":
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name=leave).click()
    expect(page.locator("#ranking").get_by_role("alert")).to_contain_text("wants an API key")
    page.complaints.expect("401")


def test_calls_at_the_same_time_share_one_dialog(guarded, visit):
    page = visit(f"{guarded.url}/#annotator")
    give(page, KEY)
    expect(page.locator("#card")).to_contain_text("null")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.complaints.expect("401")


def test_files_say_what_a_browser_may_do_with_them(service):
    answer = service.http.get("/")
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    again = service.http.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fdocs.html", "__init__.py"])
def test_there_are_no_other_files(service, name):
    assert service.http.get(f"/site/{name}").status_code == 404
