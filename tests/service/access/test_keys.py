import base64
import time
from hashlib import sha256

import httpx2
import pytest

from cwpo.errors import ConfigError
from cwpo_service.access.keys import Keyring
from cwpo_service.settings import ServeSettings
from cwpo_worker.queue.valkey import EmbeddedValkey
from harness import TIMEOUT


def digest(key):
    return sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# who may\n\nalice:{digest('wonderland')}\nbob:{digest('builder')}\n")
    return path


@pytest.fixture
def guarded(serve, keys):
    with serve(api_keys_file=keys) as service:
        yield service


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wonderland"},
        {"X-API-Key": "builder"},
        {"Authorization": f"Basic {base64.b64encode(b'openrlhf:wonderland').decode()}"},
        {"Authorization": f"basic {base64.b64encode(b':builder').decode()}"},
    ],
)
def test_a_known_key_is_let_in(guarded, headers):
    assert guarded.http.get("/model", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic wonderland"},
        {"Authorization": "Basic !"},
        {"Authorization": f"Basic {base64.b64encode(b'wonderland').decode()}"},
        {"Authorization": f"Basic {base64.b64encode(b'alice:').decode()}"},
        {"Authorization": f"Basic {base64.b64encode(bytes([255, 58, 255])).decode()}"},
        {"X-API-Key": ""},
        {"X-API-Key": "alice"},
        {"X-API-Key": digest("wonderland")},
        {"X-API-Key": b"\xff\xfe"},
    ],
)
def test_any_other_is_a_401(guarded, problem, headers):
    answer = guarded.http.get("/model", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "wonderland" not in problem(answer)["detail"]


def test_every_call_but_probes_and_documents_needs_a_key(guarded):
    open_paths = {"/health/live", "/health/ready", "/metrics"}
    paths = guarded.http.get("/openapi.json").json()["paths"]
    for path, calls in paths.items():
        for method in calls:
            answer = guarded.http.request(method, path)
            assert (answer.status_code == 401) == (path not in open_paths), (method, path)


def test_a_url_with_a_key_is_all_that_a_client_needs(guarded):
    url = guarded.url.replace("http://", "http://openrlhf:wonderland@")
    answer = httpx2.post(f"{url}/get_reward", json={"query": ["Fine."]}, timeout=TIMEOUT)
    assert len(answer.json()["rewards"]) == 1


def eventually(found, wanted):
    """Ask until the answer is the wanted one."""
    deadline = time.monotonic() + TIMEOUT
    while found() != wanted:
        assert time.monotonic() < deadline, found()
        time.sleep(0.05)


@pytest.mark.slow
def test_the_keys_follow_their_file_while_the_service_runs(guarded, keys, caplog):
    def statuses():
        return [
            guarded.http.get("/model", headers={"X-API-Key": key}).status_code
            for key in ("wonderland", "builder", "fresh")
        ]

    assert statuses() == [200, 200, 401]
    keys.write_text(f"bob:{digest('builder')}\ncarol:{digest('fresh')}\n")
    eventually(statuses, [401, 200, 200])
    # As a Secret of Kubernetes changes: another file takes the name.
    other = keys.with_name("other")
    other.write_text(f"carol:{digest('fresh')}\n")
    other.replace(keys)
    eventually(statuses, [401, 401, 200])
    keys.write_text("carol:no digest\n")
    eventually(lambda: (statuses(), "line 1 is not" in caplog.text), ([401, 401, 200], True))
    assert "fresh" not in caplog.text


def test_without_a_key_a_body_is_not_even_looked_at(guarded):
    answer = guarded.http.post("/annotate", content=b"{", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 401


CALLS = {
    "annotate": [("POST", path) for path in ("/annotate", "/score", "/rank", "/get_reward")],
    "admin": [("POST", "/model")],
    "jobs": [("POST", "/files"), ("GET", "/jobs"), ("GET", "/jobs/job_x/results")],
}


@pytest.mark.parametrize("scope", ["annotate", "jobs", "admin", "annotate,jobs", None])
def test_a_key_opens_the_calls_of_its_scopes_only(serve, tmp_path, problem, scope):
    path = tmp_path / "keys"
    path.write_text(f"carol:{digest('secret')}" + (f":{scope}" if scope else "") + "\n")
    allowed = set(CALLS) if scope == "admin" else set((scope or "annotate,jobs").split(","))
    headers = {"Authorization": "Bearer secret"}
    with serve(api_keys_file=path) as service:
        assert service.http.get("/model", headers=headers).status_code == 200
        for needed, calls in CALLS.items():
            for method, url in calls:
                answer = service.http.request(method, url, headers=headers)
                assert (answer.status_code != 403) == (needed in allowed), (method, url)
                if needed not in allowed:
                    assert f"the scope {needed}" in problem(answer)["detail"]


def test_a_key_that_asks_too_often_is_told_to_wait_and_others_are_not(serve, keys, problem):
    with serve(api_keys_file=keys, requests_per_minute=3) as service:

        def ask(key):
            return service.http.get("/model", headers={"X-API-Key": key})

        assert [ask("wonderland").status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask("wonderland")
        assert "alice is limited to 3 requests per minute" in problem(refused)["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 90
        assert ask("builder").status_code == 200


@pytest.fixture
def valkey(tmp_path):
    with EmbeddedValkey(tmp_path / "valkey") as valkey:
        yield valkey


def test_replicas_count_together_where_they_share_a_redis(serve, keys, valkey, tmp_path):
    places = {"redis_url": valkey.url, "store_url": str(tmp_path)}
    limit = {"api_keys_file": keys, "requests_per_minute": 4}
    with serve(**limit, **places) as one, serve(**limit, **places) as other:

        def ask(service):
            return service.http.get("/model", headers={"X-API-Key": "wonderland"}).status_code

        assert [ask(service) for service in (one, other, one, other)] == [200] * 4
        assert [ask(one), ask(other)] == [429, 429]


def test_while_redis_is_away_each_replica_counts_for_itself(serve, keys, caplog, tmp_path):
    places = {"redis_url": "redis://127.0.0.1:9/0", "store_url": str(tmp_path)}
    with serve(api_keys_file=keys, requests_per_minute=3, **places) as service:
        headers = {"X-API-Key": "wonderland"}
        statuses = [service.http.get("/model", headers=headers).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert caplog.text.count("rate limits count this replica only") == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"alice:{'0' * 64}:annotate,write", "line 1: 'write' is not one of the scopes annotate"),
        (f"alice:{'0' * 64}:", "line 1 is not name:sha256hex"),
        ("alice wonderland", "line 1 is not name:sha256hex"),
        (f"alice:{'0' * 64}\nbob:{'0' * 63}", "line 2 is not"),
        (f"alice:{'0' * 64}\nalice:{'1' * 64}", "line 2: the name alice is already used"),
        ("# nobody\n", "no key"),
    ],
)
def test_a_key_file_that_is_none_is_refused(tmp_path, text, complaint):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        Keyring.read(path)


def test_a_missing_key_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        Keyring.read(tmp_path / "nowhere")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "example.org"])
def test_only_loopback_needs_no_keys(host, keys):
    with pytest.raises(ValueError, match="needs --api-keys-file"):
        ServeSettings(backend="null", host=host)
    ServeSettings(backend="null", host=host, api_keys_file=keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_may_go_without(host):
    assert ServeSettings(backend="null", host=host).host == host
