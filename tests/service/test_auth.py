from hashlib import sha256

import pytest

from cwpo.errors import ConfigError
from cwpo_service.auth import Keyring
from cwpo_service.settings import ServeSettings


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
    [{"Authorization": "Bearer wonderland"}, {"X-API-Key": "builder"}],
)
def test_a_known_key_is_let_in(guarded, headers):
    assert guarded.http.get("/model", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic wonderland"},
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


def test_without_a_key_a_body_is_not_even_looked_at(guarded):
    answer = guarded.http.post("/annotate", content=b"{", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 401


CALLS = {
    "annotate": [("POST", "/annotate"), ("POST", "/score"), ("POST", "/get_reward")],
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
        assert "alice may make 3 requests a minute" in problem(refused)["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert ask("builder").status_code == 200


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"alice:{'0' * 64}:annotate,write", "line 1: 'write' is no scope; there are annotate"),
        (f"alice:{'0' * 64}:", "line 1 is not name:sha256hex"),
        ("alice wonderland", "line 1 is not name:sha256hex"),
        (f"alice:{'0' * 64}\nbob:{'0' * 63}", "line 2 is not"),
        (f"alice:{'0' * 64}\nalice:{'1' * 64}", "line 2 names alice again"),
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
