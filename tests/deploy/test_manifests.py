"""The compose files and the training manifests."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from published_schemas import check, check_compose, is_custom

DEPLOY = Path(__file__).parents[2] / "deploy"
SECRET = re.compile(r"password|key|token|secret", re.IGNORECASE)


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def training() -> list[dict]:
    files = sorted((DEPLOY / "training").glob("*.yaml"))
    return [item for path in files for item in yaml.safe_load_all(path.read_text())]


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


def test_training_objects_fit_the_kubernetes_api(training):
    for item in training:
        if not is_custom(item):
            check(item)


def test_the_trainjob_fits_its_published_schema(training):
    (trainjob,) = [item for item in training if is_custom(item)]
    check(trainjob)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_fit_the_compose_specification(name):
    document = yaml.safe_load((DEPLOY / name).read_text())
    check_compose(document)
    document["services"]["service"]["read-only"] = True
    with pytest.raises(jsonschema.ValidationError, match="read-only"):
        check_compose(document)


def test_training_is_launched_by_torchrun_with_the_same_config(training):
    (job,) = [item for item in training if item["kind"] == "Job"]
    (trainjob,) = [item for item in training if item["kind"] == "TrainJob"]
    (node,) = job["spec"]["template"]["spec"]["containers"]
    assert node["command"] == trainjob["spec"]["trainer"]["command"]
    assert node["command"][0] == "torchrun"
    assert node["command"][3:5] == ["-m", "cwpo_trainer.align"]
    (config,) = [item for item in training if item["kind"] == "ConfigMap"]
    folder, _, name = node["command"][-1].rpartition("/")
    (mount,) = [mount for mount in node["volumeMounts"] if mount["name"] == "config"]
    assert mount["mountPath"] == folder
    assert yaml.safe_load(config["data"][name])["weight"] == "confidence"


def test_a_large_checkpoint_has_its_time_after_sigterm(training):
    """torchrun by itself kills its processes after 30 s, and Kubernetes kills torchrun."""
    (job,) = [item for item in training if item["kind"] == "Job"]
    (trainjob,) = [item for item in training if item["kind"] == "TrainJob"]
    (patch,) = trainjob["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    command = trainjob["spec"]["trainer"]["command"]
    seconds = int(command[command.index("--shutdown-timeout") + 1])
    # 7B parameters with both of AdamW's moments, in float32, at 200 MB/s.
    assert seconds > 3 * 4 * 7e9 / 200e6
    for pod in (job["spec"]["template"]["spec"], node["template"]["spec"]["template"]["spec"]):
        assert pod["terminationGracePeriodSeconds"] >= seconds + 30


def test_training_config_is_known_to_align(training, settings):
    (config,) = [item for item in training if item["kind"] == "ConfigMap"]
    assert yaml.safe_load(config["data"]["align.yaml"]).keys() <= settings("align").keys()


def test_job_gives_torchrun_its_topology(training):
    (job,) = [item for item in training if item["kind"] == "Job"]
    (service,) = [item for item in training if item["kind"] == "Service"]
    pod = job["spec"]["template"]["spec"]
    env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    assert int(env["PET_NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert int(env["PET_NPROC_PER_NODE"]) == gpus
    assert env["PET_MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["ports"][0]["port"] == int(env["PET_MASTER_PORT"])


def test_training_pods_run_without_privileges(training):
    (job,) = [item for item in training if item["kind"] == "Job"]
    (trainjob,) = [item for item in training if item["kind"] == "TrainJob"]
    (patch,) = trainjob["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    for pod in (
        job["spec"]["template"]["spec"],
        node["template"]["spec"]["template"]["spec"],
    ):
        assert pod["securityContext"]["runAsNonRoot"] is True
        context = pod["containers"][0]["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
