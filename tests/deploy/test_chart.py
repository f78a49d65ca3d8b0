"""What single values of the Helm chart do; test_policies.py has what holds for all of them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import typing
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import helm_python
import manifests
import pytest
import yaml
from manifests import CHART, env, named, of_kind, pod_specs, rendered

from cwpo_annotator.checkpoint import revisions

MODEL = {"annotator": {"model": "acme/annotator"}}
ALICE = sha256(b"alice's key").hexdigest()

CASES: dict[str, dict] = {
    "model only": MODEL,
    "gpu": {
        "annotator": {"model": "/models/helpful", "existingClaim": "checkpoints"},
        "service": {
            "gpu": {"count": 1},
            "runtimeClassName": "nvidia",
            "nodeSelector": {"accelerator": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    },
    "object store, external redis": {
        "annotator": {"model": "acme/private", "hubTokenSecret": "hub"},
        "auth": {"existingSecret": "my-auth"},
        "store": {
            "url": "s3://bucket/cwpo",
            "credentialsSecret": "s3",
            "endpoint": "https://s3.example",
            "inputPrefix": "s3://bucket/triplets",
            "retentionDays": 30,
            "discardShards": True,
            "presignedSeconds": 3600,
        },
        "redis": {"mode": "external", "existingSecret": "my-redis", "caSecret": "my-ca"},
        "service": {"replicas": 3, "image": {"digest": "sha256:" + "0" * 64}},
    },
    "scaled by cpu": {**MODEL, "worker": {"autoscaling": {"mode": "cpu", "maxReplicas": 4}}},
    "scaled by queue": {**MODEL, "worker": {"autoscaling": {"mode": "queue"}}},
    "everything on": {
        **MODEL,
        "imagePullSecrets": [{"name": "registry"}],
        "commonLabels": {"team": "alignment"},
        "auth": {"keys": {"alice": ALICE}},
        "store": {"persistence": {"accessMode": "ReadWriteMany", "storageClass": "nfs"}},
        "service": {"replicas": 2, "extraEnv": [{"name": "CWPO_DTYPE", "value": "bfloat16"}]},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "host": "cwpo.example",
            "tlsSecret": "tls",
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {"allowFrom": [{"namespaceSelector": {}}]},
    },
    "nothing optional": {
        "annotator": {"backend": "null"},
        "serviceAccount": {"create": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
}


@pytest.fixture(scope="module")
def chart() -> helm_python.Chart:
    return manifests.chart()


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def objects(request) -> list[dict]:
    return rendered(CASES[request.param])


def test_lint_finds_no_warning():
    report = helm_python.lint(CHART, MODEL, strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] >= 2] == []


def test_the_service_is_probed_on_its_health_port(objects):
    service = named(objects, "Deployment", "demo-cwpo")["spec"]["template"]["spec"]
    probes = service["containers"][0]
    assert probes["startupProbe"]["httpGet"]["path"] == "/health/ready"
    assert probes["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert probes["livenessProbe"]["httpGet"]["path"] == "/health/live"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert probes[name]["httpGet"]["port"] == "health"


def test_service_has_time_to_drain(objects):
    drain = float(env(objects, "demo-cwpo")["CWPO_DRAIN_SECONDS"]["value"])
    pod = named(objects, "Deployment", "demo-cwpo")["spec"]["template"]["spec"]
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > drain + pause


@pytest.mark.parametrize(
    ("command", "deployment"), [("serve", "demo-cwpo"), ("worker", "demo-cwpo-worker")]
)
def test_every_variable_is_a_setting_of_the_command(chart, settings, command, deployment):
    names = env(rendered(CASES["everything on"]), deployment)
    variables = {name for name in names if name.startswith("CWPO_")}
    assert variables
    assert {name.removeprefix("CWPO_").lower() for name in variables} <= settings(command).keys()


def test_backends_are_those_of_the_command(chart, settings):
    offered = chart.schema["properties"]["annotator"]["properties"]["backend"]["enum"]
    assert set(offered) == set(typing.get_args(settings("serve")["backend"].annotation))


def test_worker_key_opens_the_service(chart):
    objects = rendered({**MODEL, "auth": {"keys": {"alice": ALICE}}})
    secret = named(objects, "Secret", "demo-cwpo-auth")["stringData"]
    lines = dict(line.split(":") for line in secret["keys"].splitlines())
    assert lines == {"worker": sha256(secret["worker-key"].encode()).hexdigest(), "alice": ALICE}
    pod = named(objects, "Deployment", "demo-cwpo")["spec"]["template"]["spec"]
    (keys,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys"]
    assert keys["items"] == [{"key": "keys", "path": "keys"}]


def test_two_renderings_share_no_password(chart):
    first, second = (
        named(rendered(MODEL), "Secret", "demo-cwpo-redis")["stringData"]["password"]
        for _ in range(2)
    )
    assert first != second
    assert len(first) >= 32


def test_gpu_is_requested_and_not_asked_for_twice_in_an_upgrade(chart):
    spec = named(rendered(CASES["gpu"]), "Deployment", "demo-cwpo")["spec"]
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert "memory" in limits
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_object_store_needs_no_claim_and_rolls_without_a_gap(chart):
    objects = rendered(CASES["object store, external redis"])
    assert of_kind(objects, "PersistentVolumeClaim", "StatefulSet", "Secret") == []
    assert env(objects, "demo-cwpo")["CWPO_STORE_URL"]["value"] == "s3://bucket/cwpo"
    assert env(objects, "demo-cwpo-worker")["CWPO_STORE_URL"]["value"] == "s3://bucket/cwpo"
    rolling = named(objects, "Deployment", "demo-cwpo")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


def test_the_store_s_settings_reach_those_that_read_them(chart):
    objects = rendered(CASES["object store, external redis"])
    service, worker = env(objects, "demo-cwpo"), env(objects, "demo-cwpo-worker")
    assert service["CWPO_INPUT_PREFIX"]["value"] == "s3://bucket/triplets"
    assert service["CWPO_PRESIGNED_SECONDS"]["value"] == "3600"
    assert worker["CWPO_RETENTION_DAYS"]["value"] == "30"
    assert worker["CWPO_DISCARD_SHARDS"]["value"] == "true"
    for variables in (service, worker):
        assert variables["AWS_ENDPOINT_URL"]["value"] == "https://s3.example"
    for spec in pod_specs(of_kind(objects, "Deployment")):
        mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["redis-ca"]["mountPath"] == "/etc/cwpo-redis"
    plain = rendered(MODEL)
    assert "CWPO_RETENTION_DAYS" not in env(plain, "demo-cwpo-worker")
    assert "CWPO_DISCARD_SHARDS" not in env(plain, "demo-cwpo-worker")
    assert "CWPO_PRESIGNED_SECONDS" not in env(plain, "demo-cwpo")
    assert float(env(plain, "demo-cwpo-worker")["CWPO_MODEL_WAIT"]["value"]) == 3600
    assert not any("ca.crt" in str(spec) for spec in pod_specs(plain))


def test_single_node_store_keeps_workers_beside_the_service(chart):
    pod = named(rendered(MODEL), "Deployment", "demo-cwpo-worker")["spec"]["template"]
    (term,) = pod["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "service"
    shared = rendered(CASES["everything on"])
    assert "affinity" not in named(shared, "Deployment", "demo-cwpo-worker")["spec"]["template"]


@pytest.mark.parametrize("mode", ["cpu", "queue"])
def test_autoscaled_workers_have_no_fixed_number(chart, mode):
    objects = rendered(CASES[f"scaled by {mode}"])
    assert "replicas" not in named(objects, "Deployment", "demo-cwpo-worker")["spec"]
    (scaler,) = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    assert scaler["spec"]["scaleTargetRef"]["name"] == "demo-cwpo-worker"


SCALED = {
    **MODEL,
    "store": {"url": "s3://bucket/cwpo"},
    "service": {"autoscaling": {"enabled": True, "queueTokens": 1_000_000}},
}


def test_the_service_is_scaled_by_the_tokens_that_wait_at_each_replica():
    objects = rendered(SCALED)
    assert "replicas" not in named(objects, "Deployment", "demo-cwpo")["spec"]
    spec = named(objects, "HorizontalPodAutoscaler", "demo-cwpo")["spec"]
    assert spec["scaleTargetRef"]["name"] == "demo-cwpo"
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "cwpo_queue_tokens"
    # Helm reads large numbers as 1e+06, which the API would take for something else.
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "1000000"}
    (rule,) = yaml.safe_load(adapter_rules())["rules"]["custom"]
    assert rule["seriesQuery"].startswith("cwpo_queue_tokens{")
    assert {name: o["resource"] for name, o in rule["resources"]["overrides"].items()} == {
        "namespace": "namespace",
        "pod": "pod",
    }


def adapter_rules() -> str:
    page = (CHART.parents[2] / "docs/deployment.md").read_text()
    (block,) = [
        block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "seriesQuery" in block
    ]
    return block


def test_the_target_is_one_that_a_queue_can_reach(chart, settings):
    target = chart.values["service"]["autoscaling"]["queueTokens"]
    assert target < settings("serve")["queue_tokens"].default


def test_pods_are_spread_where_the_store_allows_it():
    for name in ("demo-cwpo", "demo-cwpo-worker"):
        pod = named(rendered(SCALED), "Deployment", name)["spec"]["template"]["spec"]
        keys = [constraint["topologyKey"] for constraint in pod["topologySpreadConstraints"]]
        assert keys == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
        tied = named(rendered(MODEL), "Deployment", name)["spec"]["template"]["spec"]
        assert "topologySpreadConstraints" not in tied
    own = {"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}
    objects = rendered({**MODEL, "worker": {"topologySpreadConstraints": [own]}})
    worker = named(objects, "Deployment", "demo-cwpo-worker")["spec"]["template"]["spec"]
    assert worker["topologySpreadConstraints"] == [own]


def test_further_connections_can_be_allowed():
    collector = {"ports": [{"port": 4318}], "to": [{"namespaceSelector": {}}]}
    policy = {"allowTo": [collector], "dns": [{"namespaceSelector": {}}], "redisPort": 6380}
    external = {"mode": "external", "existingSecret": "queue"}
    store = {"url": "s3://bucket/cwpo", "endpoint": "http://minio.storage:9000"}
    values = {**MODEL, "networkPolicy": policy, "redis": external, "store": store}
    for name in ("demo-cwpo", "demo-cwpo-worker"):
        rules = named(rendered(values), "NetworkPolicy", name)["spec"]["egress"]
        assert collector in rules
        assert {"ports": [{"port": 6380}]} in rules
        assert {"ports": [{"port": 9000}]} in rules
        (names,) = [rule for rule in rules if {"port": 53, "protocol": "UDP"} in rule["ports"]]
        assert names["to"] == [{"namespaceSelector": {}}]


INGRESS = {**MODEL, "ingress": {"enabled": True, "host": "cwpo.example", "controller": "nginx"}}
NGINX = "nginx.ingress.kubernetes.io/"


def test_nginx_neither_bounds_nor_holds_back_bodies():
    (ingress,) = of_kind(rendered(INGRESS), "Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert annotations[f"{NGINX}proxy-body-size"] == "0"
    assert annotations[f"{NGINX}proxy-request-buffering"] == "off"
    assert annotations[f"{NGINX}proxy-buffering"] == "off"
    assert annotations[f"{NGINX}proxy-read-timeout"] == "1800"
    assert annotations[f"{NGINX}proxy-send-timeout"] == "1800"


def test_annotations_of_ones_own_take_precedence():
    own = {f"{NGINX}proxy-buffering": "on", "team": "alignment"}
    values = INGRESS | {"ingress": {**INGRESS["ingress"], "annotations": own, "maxBodySize": "64m"}}
    (ingress,) = of_kind(rendered(values), "Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert own.items() <= annotations.items()
    assert annotations[f"{NGINX}proxy-body-size"] == "64m"
    (plain,) = of_kind(
        rendered(INGRESS | {"ingress": {**INGRESS["ingress"], "controller": "traefik"}}), "Ingress"
    )
    assert "annotations" not in plain["metadata"]


def test_a_route_of_a_gateway_leads_to_the_service_and_has_no_time_limit():
    gateway = {"name": "public", "namespace": "gateways"}
    values = {"enabled": True, "parentRefs": [gateway], "hostnames": ["cwpo.example"]}
    (route,) = of_kind(rendered({**MODEL, "httpRoute": values}), "HTTPRoute")
    assert route["spec"]["parentRefs"] == [gateway]
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}
    assert rule["backendRefs"] == [{"name": "demo-cwpo", "port": 80}]


def test_an_air_gapped_installation_takes_nothing_from_outside():
    objects = rendered(yaml.safe_load((CHART / "values/air-gapped.yaml").read_text()))
    images = {container["image"] for container in manifests.containers(objects)}
    assert len(images) == 3
    assert all(image.startswith("registry.internal/") for image in images)
    for policy in of_kind(objects, "NetworkPolicy"):
        assert all(rule["to"] for rule in policy["spec"].get("egress", []))


@pytest.mark.slow
def test_helm_test_annotates_a_triplet():
    """What its pod runs, in its own environment, against a service that listens."""
    harness = pytest.importorskip("harness")
    pod = named(rendered(MODEL), "Pod", "demo-cwpo-test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    assert container["env"][0] == {"name": "CWPO_URL", "value": "http://demo-cwpo:80"}
    command = [sys.executable, *container["command"][1:]]
    with harness.serving() as service:
        environment = {**os.environ, "CWPO_URL": service.url}
        good = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "preferred" in good.stdout
    gone = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert gone.returncode != 0


def test_queue_scaling_reads_the_tasks_that_the_service_reports(chart):
    objects = rendered(CASES["scaled by queue"])
    (scaler,) = of_kind(objects, "ScaledObject")
    (trigger,) = scaler["spec"]["triggers"]
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    url = urlsplit(trigger["metadata"]["url"])
    service = named(objects, "Service", "demo-cwpo")
    assert url.hostname == "demo-cwpo.team.svc"
    assert {"name": "health", "port": url.port, "targetPort": "health"} in service["spec"]["ports"]
    # tests/service/telemetry/test_job_metrics.py says what this counts.
    assert trigger["metadata"]["valueLocation"] == "cwpo_tasks_unfinished"
    policy = named(objects, "NetworkPolicy", "demo-cwpo")
    assert any(
        peer.get("podSelector") == {"matchLabels": {"app": "keda-operator"}}
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
    )


@pytest.mark.parametrize(
    "values",
    [
        {"annotater": {"model": "acme/annotator"}},
        {**MODEL, "service": {"replica": 2}},
        {**MODEL, "service": {"resources": {"request": {"cpu": "1"}}}},
        {**MODEL, "worker": {"autoscaling": {"mode": "keda"}}},
        {**MODEL, "auth": {"keys": {"alice": "a key, not its hash"}}},
        {**MODEL, "auth": {"keys": {"worker": ALICE}}},
        {**MODEL, "service": {"image": {"tag": "latest"}}},
        {**MODEL, "store": {"url": "bucket/prefix"}},
        {**MODEL, "store": {"inputPrefix": "/etc"}},
        {**MODEL, "store": {"retentionDays": -1}},
        {**MODEL, "networkPolicy": {"ingressNamespaces": []}},
        {**MODEL, "ingress": {"controller": "haproxy"}},
    ],
)
def test_wrong_values_are_refused(chart, values):
    with pytest.raises(helm_python.HelmValuesError):
        chart.validate_schema(values)


def test_schema_closes_every_object_and_describes_every_value(chart):
    def visit(schema: dict, values: object, path: str) -> None:
        if "$ref" in schema:
            schema = {**chart.schema["$defs"][schema["$ref"].rpartition("/")[2]], **schema}
        assert schema.get("description"), path
        if not isinstance(values, dict) or "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        for name, value in values.items():
            visit(schema["properties"][name], value, f"{path}.{name}")

    visit(chart.schema, chart.values, "values")
    chart.validate_schema({})


def test_the_readme_lists_the_values_of_the_schema(chart):
    table = runpy.run_path(str(CHART.parent / "values_table.py"))
    text = (CHART / "README.md").read_text()
    assert text == table["readme"](), "run make chart-readme"
    assert '| `store.persistence.accessMode` | `"ReadWriteOnce"` | Access mode' in text
    listed = re.findall(r"(?m)^\| `([\w.]+)` \| `", text)
    assert {name.partition(".")[0] for name in listed} == chart.values.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "annotator.model is not set"),
        ({"annotator": {"fetch": {"from": "s3://b/a"}}}, "annotator.fetch.revision is not set"),
        ({"annotator": {"model": "a/b", "fetch": {"from": "c/d"}}}, "either fetched or there"),
        (
            {"annotator": {"model": "a/b", "former": {"fetch": {"from": "s3://b/a"}}}},
            "annotator.former.fetch.revision is not set",
        ),
        (
            {"annotator": {"model": "a/b", "former": {"model": "c", "fetch": {"from": "d"}}}},
            "either fetched or there",
        ),
        (
            {"annotator": {"model": "a/b", "vllm": {"sidecar": True}}},
            "annotator.backend is not vllm",
        ),
        ({**MODEL, "externalSecrets": {"auth": "team/keys"}}, "externalSecrets.store.name"),
        ({**MODEL, "redis": {"mode": "external"}}, "set redis.existingSecret"),
        ({**MODEL, "service": {"replicas": 2}}, "set store.url"),
        ({**MODEL, "service": {"autoscaling": {"enabled": True}}}, "set store.url"),
        ({**MODEL, "ingress": {"enabled": True}}, "set ingress.host"),
        ({**MODEL, "httpRoute": {"enabled": True}}, "set httpRoute.parentRefs"),
    ],
)
def test_what_cannot_run_is_not_rendered(values, message):
    with pytest.raises(helm_python.HelmRenderError, match=message):
        rendered(values)


def test_a_worker_without_a_recent_sign_of_life_is_started_again(tmp_path):
    """The probe itself, run as the cluster would run it."""
    (worker,) = [each for each in manifests.containers(rendered(MODEL)) if each["name"] == "worker"]
    (file,) = [each["value"] for each in worker["env"] if each["name"] == "CWPO_HEARTBEAT_FILE"]
    assert file.startswith("/tmp/")
    python, *rest = worker["livenessProbe"]["exec"]["command"]
    assert python == "python"
    sign = tmp_path / "alive"

    def status():
        environment = {**os.environ, "CWPO_HEARTBEAT_FILE": str(sign)}
        done = subprocess.run(
            [sys.executable, *rest], env=environment, capture_output=True, check=False
        )
        return done.returncode

    assert status() != 0
    sign.touch()
    assert status() == 0
    os.utime(sign, (1, 1))
    assert status() != 0


def test_the_init_container_brings_the_annotator_that_the_service_hosts(tiny_annotator, tmp_path):
    """Its command, run as the cluster would run it."""
    revision = revisions(tiny_annotator).current
    fetched = {"from": str(tiny_annotator), "revision": revision}
    objects = rendered({"annotator": {"fetch": fetched}})
    (pod,) = [pod for pod in manifests.pod_specs(objects) if "initContainers" in pod]
    (init,), (service,) = pod["initContainers"], pod["containers"]
    (model,) = [each["value"] for each in service["env"] if each["name"] == "CWPO_ANNOTATOR"]
    command, *words = [word.replace("/models/", f"{tmp_path}/") for word in init["command"]]
    assert command == "cwpo"
    subprocess.run([sys.executable, "-m", "cwpo", *words], check=True)
    assert revisions(tmp_path / Path(model).relative_to("/models")).current == revision
    mounts = [
        {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        for container in (init, service)
    ]
    assert mounts[0]["/models"] == mounts[1]["/models"]


def test_the_former_annotator_has_pods_of_its_own_that_only_workers_ask():
    fetch = {"from": "s3://bucket/first", "revision": "0" * 12}
    objects = rendered(
        {
            "annotator": {"model": "acme/second", "former": {"fetch": fetch, "replicas": 2}},
            "service": {"replicas": 3, "autoscaling": {"enabled": False}},
            "store": {"url": "s3://bucket/cwpo"},
            "ingress": {"enabled": True, "host": "cwpo.example"},
        }
    )
    former, service = (
        named(objects, "Deployment", name) for name in ("demo-cwpo-former", "demo-cwpo")
    )
    assert [host["spec"]["replicas"] for host in (former, service)] == [2, 3]
    hosted = [
        env(objects, name)["CWPO_ANNOTATOR"]["value"] for name in ("demo-cwpo-former", "demo-cwpo")
    ]
    assert hosted == ["/models/annotator", "acme/second"]
    (init,) = former["spec"]["template"]["spec"]["initContainers"]
    assert init["command"][2] == "s3://bucket/first"
    assert "initContainers" not in service["spec"]["template"]["spec"]
    worker = env(objects, "demo-cwpo-worker")
    assert worker["CWPO_URL"]["value"] == "http://demo-cwpo:80"
    assert worker["CWPO_FORMER_URL"]["value"] == "http://demo-cwpo-former:80"
    (ingress,) = of_kind(objects, "Ingress")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["name"] == "demo-cwpo"
    without = rendered({"annotator": {"model": "acme/second"}})
    assert "former" not in yaml.safe_dump_all(without)


def test_a_gpu_goes_to_whoever_scores():
    values = {"annotator": {"model": "a/b", "backend": "vllm", "vllm": {"sidecar": True}}}
    objects = rendered({**values, "service": {"gpu": {"count": 1}}})
    (pod,) = [pod for pod in manifests.pod_specs(objects) if "initContainers" in pod]
    (vllm,), (service,) = pod["initContainers"], pod["containers"]
    assert vllm["restartPolicy"] == "Always"
    assert vllm["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in service["resources"]["limits"]
