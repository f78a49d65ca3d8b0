"""Whatever a client sends, the service answers, and never with a 500."""

import gzip
import json
import socket

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import TIMEOUT

pytestmark = pytest.mark.slow

SETTINGS = settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Lone surrogates too: JSON can spell them, and they are no Unicode.
TEXT = st.text(st.characters(), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": TEXT | JSON}
    ),
    max_size=3,
)


def like(**fields):
    """Objects with these fields, some of them something else, some missing, some new."""
    optional = {name: strategy | JSON for name, strategy in fields.items()}
    objects = st.fixed_dictionaries({}, optional=optional)
    return st.fixed_dictionaries(fields) | objects | st.dictionaries(TEXT, JSON, max_size=2)


PROMPT = TEXT | MESSAGES
TRIPLET = like(id=TEXT, prompt=PROMPT, response_a=TEXT, response_b=TEXT)
ITEM = like(prompt=PROMPT, response=TEXT)
BODIES = {
    "/annotate": like(
        triplets=st.lists(TRIPLET, max_size=3),
        truncation=st.sampled_from(["error", "prompt_left"]),
        priority=st.sampled_from(["interactive", "batch"]),
    ),
    "/score": like(items=st.lists(ITEM, max_size=3)),
    "/rank": like(
        items=st.lists(
            like(id=TEXT, prompt=PROMPT, responses=st.lists(TEXT, max_size=4)), max_size=3
        ),
        truncation=st.sampled_from(["error", "prompt_left"]),
        priority=st.sampled_from(["interactive", "batch"]),
    ),
    "/get_reward": like(query=st.lists(TEXT, max_size=3), prompts=st.lists(TEXT, max_size=3)),
    "/jobs": like(
        file_id=TEXT,
        input=TEXT,
        truncation=st.sampled_from(["error", "prompt_left"]),
        max_rejected_share=st.floats(),
        merge=st.sampled_from(["auto", "never"]),
        pairs=st.sampled_from(["best_worst", "adjacent", "all"]),
    ),
}


@pytest.fixture(scope="module")
def house(furnish, tmp_path_factory):
    with furnish(tmp_path_factory.mktemp("fuzz")) as house:
        yield house


@pytest.fixture(scope="module")
def office(house):
    return house.service


@pytest.fixture(scope="module")
def finished(house):
    """The id of a job that has ended."""
    job_id = house.submit(house.rows(20))
    house.work()
    return job_id


def check(answer):
    assert answer.status_code < 500, answer.text
    assert answer.headers["x-request-id"]
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]


@pytest.mark.parametrize("path", BODIES)
def test_any_json_is_answered(office, path):
    @SETTINGS
    @given(BODIES[path] | JSON)
    def fuzz(body):
        # ASCII escapes, so that surrogates get through to the service.
        content = json.dumps(body).encode("ascii")
        headers = {"Content-Type": "application/json"}
        check(office.http.post(path, content=content, headers=headers))

    fuzz()


@pytest.mark.parametrize("path", [*BODIES, "/files"])
def test_any_bytes_are_answered(office, path):
    kinds = ["application/json", "application/x-ndjson", "application/gzip", "text/plain", ""]

    @SETTINGS
    @given(st.binary(max_size=50), st.sampled_from(kinds))
    def fuzz(body, kind):
        check(office.http.post(path, content=body, headers={"Content-Type": kind}))

    fuzz()


SEGMENT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@SETTINGS
@given(
    path=st.sampled_from(
        [f"/jobs/{{}}{below}" for below in ("", "/results", "/parts", "/errors", "/events")]
        + ["/files/{}", "/{}"]
    ),
    segment=SEGMENT | st.sampled_from(["..", "job_", "file_" + "0" * 32, "\x00", "a" * 5000]),
    params=st.dictionaries(
        st.sampled_from(["format", "limit", "cursor", "state"]), SEGMENT, max_size=2
    ),
)
def test_any_path_and_query_are_answered(office, path, segment, params):
    url = path.format(httpx2.QueryParams({"x": segment}).__str__()[2:].replace("+", "%20"))
    check(office.http.get(url, params=params))


@SETTINGS
@given(params=st.dictionaries(st.sampled_from(["limit", "cursor", "state"]), SEGMENT, min_size=1))
def test_any_page_of_jobs_is_answered(office, params):
    check(office.http.get("/jobs", params=params))


@SETTINGS
@given(
    name=SEGMENT | st.from_regex(r"part-[0-9]{1,9}\.parquet", fullmatch=True),
    cursor=SEGMENT | st.integers().map(str),
    span=st.from_regex(r"bytes=[0-9]{0,20}-[0-9]{0,20}(,[0-9]-)?", fullmatch=True),
)
def test_any_part_page_and_range_of_an_ended_job_is_answered(office, finished, name, cursor, span):
    path = httpx2.QueryParams({"x": name}).__str__()[2:].replace("+", "%20")
    check(office.http.get(f"/jobs/{finished}/parts", params={"cursor": cursor}))
    check(office.http.get(f"/jobs/{finished}/parts/{path}", headers={"Range": span}))
    first = f"/jobs/{finished}/parts/part-00000000.parquet"
    check(office.http.get(first, headers={"Range": span}))


HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
ANY_HEADER = HEADER.map(lambda text: text.strip().encode("latin-1"))


@SETTINGS
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["Authorization", "X-API-Key", "X-Request-ID", "Idempotency-Key", "Range", "Accept"]
        ),
        ANY_HEADER,
    )
)
def test_any_header_is_answered(office, headers):
    body = json.dumps({"file_id": "file_x"}).encode()
    check(
        office.http.post(
            "/jobs", content=body, headers={"Content-Type": "application/json", **headers}
        )
    )


NUMBER = st.integers(0, 10**6) | st.sampled_from(["", "9" * 5000])
RANGE = st.lists(st.tuples(NUMBER, NUMBER), max_size=3).map(
    lambda parts: "bytes=" + ",".join(f"{first}-{last}" for first, last in parts)
)


@SETTINGS
@given(
    path=st.sampled_from(
        ["", "/results", "/results?format=parquet", "/results?format=jsonl", "/errors", "/events"]
    ),
    headers=st.dictionaries(
        st.sampled_from(
            [
                *("Accept", "Accept-Encoding", "If-None-Match", "If-Range", "Last-Event-ID"),
                *("Host", "X-Request-Timeout", "X-Request-ID", "traceparent"),
            ]
        ),
        ANY_HEADER,
    ),
    range=st.none() | RANGE | ANY_HEADER,
)
def test_any_header_of_a_download_is_answered(office, finished, path, headers, range):
    ranges = {} if range is None else {"Range": range}
    check(office.http.get(f"/jobs/{finished}{path}", headers=headers | ranges))


@SETTINGS
@given(
    position=st.integers(0, 44),
    character=st.characters(codec="ascii"),
    cut=st.integers(0, 45),
    limit=st.integers(1, 100),
)
def test_any_change_of_a_cursor_is_answered(house, office, position, character, cut, limit):
    for _ in range(2 - len(office.http.get("/jobs").json()["jobs"])):
        house.submit(house.rows(1))
    cursor = office.http.get("/jobs", params={"limit": 1}).json()["next_cursor"]
    changed = (cursor[:position] + character + cursor[position + 1 :])[:cut]
    check(office.http.get("/jobs", params={"cursor": changed, "limit": limit}))


LINES = st.lists(st.sampled_from([b"{}", b"[]", b'{"prompt": "p"', b" " * 2000]), max_size=4)


@st.composite
def gzipped(draw):
    """Members of gzip one after the other, changed at a place, cut, and followed by something."""
    members = [
        gzip.compress(b"\n".join(draw(LINES)), mtime=0) for _ in range(draw(st.integers(1, 2)))
    ]
    data = bytearray(b"".join(members))
    if draw(st.booleans()):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) + draw(st.binary(max_size=5))


@pytest.mark.parametrize("path", [*BODIES, "/files"])
def test_any_gzip_is_answered(office, path):
    headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}

    @SETTINGS
    @given(gzipped())
    def fuzz(body):
        check(office.http.post(path, content=body, headers=headers))

    fuzz()


@SETTINGS
@given(
    path=st.sampled_from([*BODIES, "/files"]),
    boundary=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=80),
    parts=st.lists(st.binary(max_size=40), max_size=3),
)
def test_any_form_is_answered(office, path, boundary, parts):
    mark = b"--" + boundary.encode()
    body = b"".join(mark + b"\r\n\r\n" + part + b"\r\n" for part in parts) + mark + b"--"
    kind = f"multipart/form-data; boundary={boundary}".strip()
    check(office.http.post(path, content=body, headers={"Content-Type": kind}))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Length: ten\r\n\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nshort",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
def test_no_broken_request_breaks_the_service(office, request_bytes):
    host, port = office.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    check(office.http.get("/health/ready"))
