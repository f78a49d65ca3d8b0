"""A web page whose name was made to resolve to this machine gets no answer."""

from hashlib import sha256

import pytest

from cwpo_service.access.hosts import AllowedHosts


def status(service, host, path="/model"):
    return service.http.get(path, headers={"Host": host}).status_code


@pytest.mark.parametrize("path", ["/model", "/docs", "/health/live", "/metrics", "/nothing"])
def test_without_keys_a_foreign_name_is_refused_at_every_path(service, problem, path):
    answer = service.http.get(path, headers={"Host": "evil.example"})
    assert answer.status_code == 421
    assert "--allowed-hosts" in problem(answer)["detail"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:80", "LOCALHOST:1", "10.0.0.1"])
def test_addresses_and_this_machine_are_answered(service, host):
    assert status(service, host) == 200


@pytest.mark.parametrize(
    "host", ["localhost.evil.example", "127.0.0.1.evil.example", "[", "", "a@b"]
)
def test_what_only_looks_like_one_is_not(service, host):
    assert status(service, host) == 421


def test_an_operator_names_hosts(serve):
    with serve(allowed_hosts="annotator.corp, *.example.org") as service:
        assert status(service, "annotator.corp:8000") == 200
        assert status(service, "a.b.example.org") == 200
        assert status(service, "example.org") == 421
        assert status(service, "evil.example") == 421


def test_with_keys_the_key_is_what_counts(serve, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{sha256(b'wonderland').hexdigest()}\n")
    with serve(api_keys_file=keys) as service:
        assert status(service, "anything.example") == 401
    with serve(api_keys_file=keys, allowed_hosts="annotator.corp") as service:
        assert status(service, "anything.example") == 421


def test_a_star_is_any_name():
    assert AllowedHosts("*").allow("evil.example")
