"""Whatever a client sends, the service answers, and never with a 500."""

import json
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo_worker.valkey import EmbeddedValkey

SETTINGS = settings(
    max_examples=150,
    deadline=None,
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
    "/get_reward": like(query=st.lists(TEXT, max_size=3), prompts=st.lists(TEXT, max_size=3)),
    "/jobs": like(file_id=TEXT, truncation=st.sampled_from(["error", "prompt_left"])),
}


@pytest.fixture(scope="module")
def office(serve, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with (
        EmbeddedValkey(folder / "valkey") as valkey,
        serve(redis_url=valkey.url, store_url=str(folder / "store")) as service,
    ):
        yield service


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
        ["/jobs/{}", "/jobs/{}/results", "/jobs/{}/errors", "/jobs/{}/events", "/files/{}", "/{}"]
    ),
    segment=SEGMENT | st.sampled_from(["..", "job_", "file_" + "0" * 32, "\x00", "a" * 5000]),
    params=st.dictionaries(
        st.sampled_from(["format", "limit", "cursor", "state"]), SEGMENT, max_size=2
    ),
)
def test_any_path_and_query_are_answered(office, path, segment, params):
    url = path.format(httpx.QueryParams({"x": segment}).__str__()[2:].replace("+", "%20"))
    check(office.http.get(url, params=params))


@SETTINGS
@given(params=st.dictionaries(st.sampled_from(["limit", "cursor", "state"]), SEGMENT, min_size=1))
def test_any_page_of_jobs_is_answered(office, params):
    check(office.http.get("/jobs", params=params))


HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))


@SETTINGS
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["Authorization", "X-API-Key", "X-Request-ID", "Idempotency-Key", "Range", "Accept"]
        ),
        HEADER.map(lambda text: text.strip().encode("latin-1")),
    )
)
def test_any_header_is_answered(office, headers):
    body = json.dumps({"file_id": "file_x"}).encode()
    check(
        office.http.post(
            "/jobs", content=body, headers={"Content-Type": "application/json", **headers}
        )
    )


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /annotate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nshort",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
def test_no_broken_request_breaks_the_service(office, request_bytes):
    host, port = office.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    check(office.http.get("/health/ready"))
