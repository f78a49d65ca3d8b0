"""What is asked for until a file is complete: no socket and no clock is needed for it."""

from __future__ import annotations

import hashlib

import httpx2
import pytest

from cwpo.download import Download
from cwpo.errors import APIError, ConnectionFailedError, DamagedDownloadError, api_error
from cwpo.partial_file import ResumableFile
from cwpo.transport import Request
from cwpo.types import Problem

CONTENT = b"all rows of a part"
STORE, SERVICE = Request("GET", "https://store/part"), Request("GET", "/parts/part")
CUT = ConnectionFailedError("cut")
REFUSED = api_error(Problem(title="Forbidden", status=403, detail="expired"))


@pytest.fixture
def download(tmp_path):
    """`download(*sources, content=, limit=)`: of the file `part`, by default from the service."""

    def start(*sources, content=CONTENT, limit=4):
        checksum = hashlib.sha256(content).hexdigest()
        file = ResumableFile(tmp_path / "part", len(content), checksum)
        return Download(sources or (SERVICE,), file, limit)

    return start


def span(request):
    return request.headers.get("Range")


def answer(download, content, start=0, error=None):
    """Answer with the content, which is that of the file from `start` on, and then fail."""
    headers = {"Content-Range": f"bytes {start}-99/100"} if start else {}
    with download.receiving(httpx2.Response(206 if start else 200, headers=headers)) as out:
        out.write(content)
        if error is not None:
            raise error


def interrupt(download, content):
    with pytest.raises(ConnectionFailedError):
        answer(download, content, error=CUT)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_is_asked_for_until_it_is_complete(download, tmp_path):
    received = download()
    assert span(received.request()) is None
    answer(received, CONTENT)
    assert received.request() is None
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert names_in(tmp_path) == ["part"]
    assert download().request() is None


@pytest.mark.parametrize("again", [False, True], ids=["the same download", "another one"])
def test_what_broke_off_is_asked_for_from_there_on(download, tmp_path, again):
    received = download()
    interrupt(received, CONTENT[:3])
    assert not (tmp_path / "part").exists()
    if again:
        received = download()
    asked = received.request()
    assert asked.headers == {"Accept-Encoding": "identity", "Range": "bytes=3-"}
    answer(received, CONTENT[3:], start=3)
    assert received.request() is None
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_an_answer_may_begin_before_the_byte_that_was_asked_for(download, tmp_path):
    received = download()
    interrupt(received, b"whatever")
    assert span(received.request()) == "bytes=8-"
    answer(received, CONTENT)
    assert received.request() is None
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_a_failure_after_the_last_byte_costs_no_further_request(download, tmp_path):
    received = download()
    interrupt(received, CONTENT)
    assert received.request() is None
    assert (tmp_path / "part").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "wrong", [CONTENT[:-1], CONTENT[:-1] + b"X", CONTENT + b"X"], ids=["short", "other", "long"]
)
def test_what_has_another_checksum_is_discarded_and_asked_for_anew(download, tmp_path, wrong):
    received = download()
    with pytest.raises(DamagedDownloadError, match=r"part: .* checksum"):
        answer(received, wrong)
    assert names_in(tmp_path) == []
    assert span(received.request()) is None


def test_all_bytes_of_an_earlier_run_are_discarded_if_they_are_wrong(download, tmp_path):
    interrupt(download(), b"X" * len(CONTENT))
    assert span(download().request()) is None
    assert names_in(tmp_path) == []


def test_a_file_under_the_name_with_other_content_is_replaced(download, tmp_path):
    (tmp_path / "part").write_bytes(b"another's")
    received = download()
    answer(received, CONTENT)
    assert received.request() is None
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_an_empty_file_is_received_too(download, tmp_path):
    received = download(content=b"")
    assert received.request() is not None
    answer(received, b"")
    assert received.request() is None
    assert (tmp_path / "part").read_bytes() == b""


@pytest.mark.parametrize("error", [CUT, REFUSED], ids=["temporary", "permanent"])
def test_a_source_that_fails_is_given_up_for_the_next_one_at_once(download, error):
    received = download(STORE, SERVICE, limit=0)
    assert received.request().path == STORE.path
    interrupt(received, CONTENT[:3])
    assert received.delay(error) == 0
    asked = received.request()
    assert (asked.path, span(asked)) == (SERVICE.path, "bytes=3-")
    with pytest.raises(type(error)):
        received.delay(error)


def test_the_last_source_is_asked_again_after_failures_that_time_may_mend(download):
    received = download(STORE, SERVICE, limit=2)
    received.delay(CUT)
    assert received.delay(CUT) > 0
    assert received.delay(DamagedDownloadError("wrong")) > 0
    assert received.request().path == SERVICE.path
    with pytest.raises(ConnectionFailedError):
        received.delay(CUT)
    with pytest.raises(APIError):
        download(limit=2).delay(REFUSED)
