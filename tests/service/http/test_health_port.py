"""Probes and metrics on a port of their own, away from those who may only annotate."""

import httpx2
import pytest

from cwpo_service.settings import ServeSettings
from harness import TIMEOUT

PROBES = ["/health/live", "/health/ready", "/metrics"]


@pytest.fixture
def apart(serve):
    """A service, and the URL of its other port."""
    with serve(health_port=0) as service:
        yield service, service.health_url


@pytest.mark.parametrize("path", PROBES)
def test_probes_are_at_their_port_and_at_no_other(apart, problem, path):
    service, url = apart
    assert httpx2.get(url + path, timeout=TIMEOUT).status_code == 200
    answer = service.http.get(path)
    assert answer.status_code == 404
    assert "on this port" in problem(answer)["detail"]


def test_nothing_else_is_there(apart, triplet, problem):
    service, url = apart
    assert service.annotate(triplet()).status_code == 200
    answer = httpx2.post(f"{url}/annotate", json={"triplets": [triplet()]}, timeout=TIMEOUT)
    assert answer.status_code == 404
    assert "on this port" in problem(answer)["detail"]
    for path in ("/model", "/docs", "/openapi.json", "/nowhere", "/health"):
        assert httpx2.get(url + path, timeout=TIMEOUT).status_code == 404


def test_one_port_for_both_is_refused():
    with pytest.raises(ValueError, match="--health-port is the same as --port"):
        ServeSettings(backend="null", port=8000, health_port=8000)
