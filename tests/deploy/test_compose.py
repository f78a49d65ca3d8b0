"""The compose files."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from published_schemas import check_compose

DEPLOY = Path(__file__).parents[2] / "deploy"
SECRET = re.compile(r"password|key|token|secret", re.IGNORECASE)


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_compose_has_no_default_for_a_secret():
    text = (DEPLOY / "compose.yaml").read_text()
    variables = re.findall(r"\$\{(\w+)([^}]*)\}", text)
    secrets = [(name, rest) for name, rest in variables if SECRET.search(name)]
    assert {name for name, _ in secrets} == {
        "CWPO_REDIS_PASSWORD",
        "CWPO_WORKER_API_KEY",
        "CWPO_API_KEYS_FILE",
    }
    assert all(rest.startswith(":?") for _, rest in secrets)


def test_compose_services_are_hardened_and_start_in_order(compose):
    services = compose["services"]
    asked_for = {name for name, service in services.items() if "profiles" in service}
    assert services.keys() - asked_for == {"valkey", "service", "worker"}
    assert asked_for == {"prometheus", "grafana"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert not service["image"].endswith(":latest")
    assert services["service"]["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert services["worker"]["depends_on"] == {"service": {"condition": "service_healthy"}}
    assert "healthcheck" in services["valkey"]


def test_compose_publishes_on_loopback_only(compose):
    published = {name: s["ports"] for name, s in compose["services"].items() if "ports" in s}
    assert published.keys() == {"service", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_compose_volumes_are_declared(compose):
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_file()
            elif not volume.startswith("${"):
                assert source in compose["volumes"]


@pytest.mark.parametrize(("service", "command"), [("service", "serve"), ("worker", "worker")])
def test_compose_sets_what_the_command_reads(compose, settings, service, command):
    variables = compose["services"][service]["environment"]
    assert {name.removeprefix("CWPO_").lower() for name in variables} <= settings(command).keys()


def test_compose_gpu_file_changes_a_service_that_exists(compose):
    gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
    assert gpu["services"].keys() <= compose["services"].keys()


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_fit_the_compose_specification(name):
    document = yaml.safe_load((DEPLOY / name).read_text())
    check_compose(document)
    document["services"]["service"]["read-only"] = True
    with pytest.raises(jsonschema.ValidationError, match="read-only"):
        check_compose(document)
