"""What holds for every object of the chart, whatever values it is rendered with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import (
    CHART,
    NAMESPACE,
    Object,
    behind,
    containers,
    every_pair,
    merged,
    named,
    of_kind,
    pod_specs,
    pods,
    port_number,
    rendered,
    selected,
)
from network_policies import Peer, lets_through, selects
from published_schemas import check, is_custom

MODEL: Object = {"annotator": {"model": "acme/annotator"}}
DIGEST = "sha256:" + "0" * 64

# Any two options of two axes are rendered together.
AXES: dict[str, dict[str, Object]] = {
    "annotator": {
        "hub": MODEL,
        "private": {"annotator": {"model": "acme/annotator", "hubTokenSecret": "hub"}},
        "claim": {"annotator": {"model": "/models/helpful", "existingClaim": "checkpoints"}},
        "fetched": {
            "annotator": {"fetch": {"from": "s3://models/helpful", "revision": "0123456789ab"}}
        },
        "vllm": {
            "annotator": {"model": "/models/a", "existingClaim": "checkpoints", "backend": "vllm"},
            "service": {"extraEnv": [{"name": "CWPO_VLLM_URL", "value": "http://vllm:8000"}]},
        },
        "vllm sidecar": {
            "annotator": {
                "model": "/models/a",
                "existingClaim": "checkpoints",
                "backend": "vllm",
                "vllm": {"sidecar": True, "arguments": ["--dtype=bfloat16"]},
            },
        },
        "none": {"annotator": {"backend": "null"}},
    },
    "former": {
        "none": {},
        "on the hub": {"annotator": {"former": {"model": "acme/annotator-1"}}},
    },
    "store": {
        "one node": {},
        "own claim": {"store": {"persistence": {"existingClaim": "results"}}},
        "shared claim": {
            "store": {"persistence": {"accessMode": "ReadWriteMany", "storageClass": "nfs"}},
            "service": {"autoscaling": {"enabled": True, "maxReplicas": 3}},
        },
        "bucket": {
            "store": {
                "url": "s3://bucket/cwpo",
                "credentialsSecret": "s3",
                "endpoint": "https://s3.example",
                "inputPrefix": "s3://bucket/triplets",
                "retentionDays": 30,
                "discardShards": True,
                "presignedSeconds": 3600,
            },
            "service": {"replicas": 3},
        },
        "external secret": {
            "store": {"url": "s3://bucket/cwpo"},
            "externalSecrets": {"store": {"name": "vault"}, "objectStore": "team/bucket"},
        },
    },
    "redis": {
        "embedded": {},
        "external": {"redis": {"mode": "external", "existingSecret": "queue"}},
        "private authority": {
            "redis": {"mode": "external", "existingSecret": "queue", "caSecret": "authority"}
        },
        "external secret": {
            "redis": {"mode": "external"},
            "externalSecrets": {"store": {"name": "vault"}, "redis": "team/queue"},
        },
    },
    "keys": {
        "workers only": {},
        "given": {"auth": {"keys": {"alice": sha256(b"alice's key").hexdigest()}}},
        "own secret": {"auth": {"existingSecret": "keys"}},
        "external secret": {"externalSecrets": {"store": {"name": "vault"}, "auth": "team/keys"}},
    },
    "scaling": {
        "fixed": {},
        "cpu": {"worker": {"autoscaling": {"mode": "cpu", "maxReplicas": 4}}},
        "queue": {"worker": {"autoscaling": {"mode": "queue"}}},
    },
    "nodes": {
        "any": {},
        "gpu": {
            "service": {
                "gpu": {"count": 1},
                "runtimeClassName": "nvidia",
                "nodeSelector": {"accelerator": "h100"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            }
        },
    },
    "outside": {
        "closed": {},
        "open": {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "controller": "nginx",
                "host": "cwpo.example",
                "tlsSecret": "tls",
            },
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
        },
        "gateway": {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "public", "namespace": "gateways"}],
                "hostnames": ["cwpo.example"],
            },
            "networkPolicy": {"ingressNamespaces": ["gateways"]},
        },
        "all namespaces": {"networkPolicy": {"allowFrom": [{"namespaceSelector": {}}]}},
        "no policies": {
            "networkPolicy": {"enabled": False},
            "podDisruptionBudget": {"enabled": False},
        },
    },
    "names": {
        "default": {},
        "own": {
            "fullnameOverride": "labels",
            "commonLabels": {"team": "alignment"},
            "imagePullSecrets": [{"name": "registry"}],
            "serviceAccount": {"create": False, "name": "annotator"},
            "service": {"image": {"digest": DIGEST}},
        },
        "other name": {"nameOverride": "annotation", "serviceAccount": {"create": False}},
    },
}

# Values that name an object of the user's own; values.schema.json describes each.
EXISTING = {
    "Secret": [
        "annotator.hubTokenSecret",
        "auth.existingSecret",
        "store.credentialsSecret",
        "redis.existingSecret",
        "redis.caSecret",
        "ingress.tlsSecret",
        "imagePullSecrets",
    ],
    "PersistentVolumeClaim": ["annotator.existingClaim", "store.persistence.existingClaim"],
    "ServiceAccount": ["serviceAccount.name"],
    "ConfigMap": [],
}
# Values files for common installations, and what each leaves to be set.
FILES = {path.stem: path for path in sorted((CHART / "values").glob("*.yaml"))}
LEFT_OPEN = {"trial": MODEL, "gpu": AXES["annotator"]["claim"], "fleet": MODEL}
CHOICES = {"-".join(choice.values()).replace(" ", "_"): choice for choice in every_pair(AXES)}


@pytest.fixture(scope="module", params=[*FILES, *CHOICES])
def values(request) -> Object:
    if request.param in FILES:
        own = yaml.safe_load(FILES[request.param].read_text())
        return merged(LEFT_OPEN.get(request.param, {}), own)
    choice = CHOICES[request.param]
    return merged(*(AXES[axis][option] for axis, option in choice.items()))


@pytest.fixture(scope="module")
def objects(values) -> list[Object]:
    return rendered(values)


def test_every_pair_of_options_is_rendered():
    chosen = [set(choice.items()) for choice in CHOICES.values()]
    options = [(axis, option) for axis in AXES for option in AXES[axis]]
    for first in options:
        for second in options:
            if first[0] != second[0]:
                assert any({first, second} <= choice for choice in chosen)


def test_every_object_fits_the_kubernetes_api(objects):
    for item in objects:
        if not is_custom(item):
            check(item)


def test_custom_resources_fit_their_published_schemas(objects):
    for item in objects:
        if is_custom(item):
            check(item)


@pytest.mark.parametrize("field", ["spec", "scaleTargetRef", "trigger"])
def test_a_misspelt_field_of_a_custom_resource_is_found(field):
    objects = rendered(MODEL | AXES["scaling"]["queue"])
    (scaler,) = of_kind(objects, "ScaledObject")
    check(scaler)
    spec = scaler["spec"]
    (trigger,) = spec["triggers"]
    place = {"spec": spec, "scaleTargetRef": spec["scaleTargetRef"], "trigger": trigger}[field]
    place["minReplicas"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplicas"):
        check(scaler)


def test_a_misspelt_field_of_the_kubernetes_api_is_found():
    service = named(rendered(MODEL), "Deployment", "demo-cwpo")
    check(service)
    (container,) = containers([service])
    container["readynessProbe"] = container["readinessProbe"]
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        check(service)


def test_names_are_unique(objects):
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names)


def test_every_selector_selects_the_pods_of_one_workload(objects):
    selectors = [item["spec"]["selector"] for item in of_kind(objects, "Service")]
    for item in of_kind(objects, "Deployment", "StatefulSet", "PodDisruptionBudget"):
        selectors.append(item["spec"]["selector"]["matchLabels"])
    for item in of_kind(objects, "NetworkPolicy"):
        selectors.append(item["spec"]["podSelector"]["matchLabels"])
    for pod in pod_specs(objects):
        for term in _terms(pod.get("affinity", {})):
            selectors.append(term["labelSelector"]["matchLabels"])
        for constraint in pod.get("topologySpreadConstraints", []):
            selectors.append(constraint["labelSelector"]["matchLabels"])
    assert selectors
    for selector in selectors:
        assert len(selected(objects, selector)) == 1


def _terms(affinity: Object) -> Iterator[Object]:
    for kind in affinity.values():
        yield from kind.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        for preferred in kind.get("preferredDuringSchedulingIgnoredDuringExecution", []):
            yield preferred["podAffinityTerm"]


def test_whatever_is_referred_to_by_name_is_rendered(objects):
    for item in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = item["spec"]["scaleTargetRef"]
        named(objects, target.get("kind", "Deployment"), target["name"])
    for item in of_kind(objects, "StatefulSet"):
        named(objects, "Service", item["spec"]["serviceName"])
    for item in of_kind(objects, "Service"):
        for entry in item["spec"]["ports"]:
            assert behind(objects, item["metadata"]["name"], entry["name"])
    for item in of_kind(objects, "Ingress"):
        for rule in item["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert behind(objects, backend["name"], backend["port"]["name"])
    for item in of_kind(objects, "HTTPRoute"):
        for rule in item["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert behind(objects, backend["name"], backend["port"])
    for item in of_kind(objects, "ServiceMonitor"):
        services = _monitored(objects, item)
        hosts = {_part(host) for host in of_kind(objects, "Deployment")} - {"worker"}
        assert {_part(service) for service in services} == hosts
        for service in services:
            for endpoint in item["spec"]["endpoints"]:
                assert behind(objects, service["metadata"]["name"], endpoint["port"])


def _part(item: Object) -> str:
    part: str = item["metadata"]["labels"]["app.kubernetes.io/component"]
    return part


def _monitored(objects: list[Object], monitor: Object) -> list[Object]:
    selector = monitor["spec"]["selector"]
    return [
        service
        for service in of_kind(objects, "Service")
        if selects(selector, service["metadata"]["labels"])
    ]


def test_pods_run_without_privileges(objects):
    for pod in pod_specs(objects):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["runAsGroup"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
    for container in containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"privileged", "runAsUser", "seccompProfile"}.isdisjoint(context)
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    granted = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    assert granted.isdisjoint(item["kind"] for item in objects)


def test_service_links_do_not_set_cwpo_variables(objects):
    # A Service called cwpo would put CWPO_PORT=tcp://... into every pod of the namespace.
    assert all(pod["enableServiceLinks"] is False for pod in pod_specs(objects))


def test_every_container_has_resources_and_a_pinned_image(objects):
    for container in containers(objects):
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        tag = container["image"].rpartition("/")[2]
        assert "@sha256:" in tag or (":" in tag and not tag.endswith(":latest"))


def test_whatever_listens_is_probed(objects):
    for pod in pods(objects):
        for container in pod["spec"]["containers"]:
            probes = [value for name, value in container.items() if name.endswith("Probe")]
            if "ports" in container:
                assert {"readinessProbe", "livenessProbe"} <= container.keys()
            for probe in probes:
                action = probe.get("httpGet") or probe.get("tcpSocket")
                if action:
                    assert port_number(pod, action["port"])
                else:
                    assert probe["exec"]["command"][0] not in ("sh", "bash", "/bin/sh")


def test_whatever_runs_on_is_started_again_when_it_hangs(objects):
    """Jobs end by themselves, and a Valkey that hangs answers no probe of its port."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
            for container in item["spec"]["template"]["spec"]["containers"]:
                assert "livenessProbe" in container, container["name"]


def test_referenced_objects_are_rendered_or_the_users_own(values, objects):
    made = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    given = {(kind, name) for kind in EXISTING for name in _given(values, EXISTING[kind])}
    given.add(("ServiceAccount", "default"))
    given |= {("Secret", name) for name in _brought(objects)}
    referenced = list(_references(objects))
    assert referenced
    for kind, name, keys in referenced:
        assert (kind, name) in made.keys() | given
        if (kind, name) in made and keys:
            item = made[kind, name]
            assert keys <= {**item.get("stringData", {}), **item.get("data", {})}.keys()


def test_the_users_own_objects_are_all_used(values, objects):
    """A value that names an object and has no effect would mislead."""
    referenced = {(kind, name) for kind, name, _ in _references(objects)}
    for kind, paths in EXISTING.items():
        assert {(kind, name) for name in _given(values, paths)} <= referenced


def test_secrets_that_are_brought_are_all_used(values, objects):
    brought = _brought(objects)
    entries = [
        entry for name, entry in values.get("externalSecrets", {}).items() if name != "store"
    ]
    assert len(brought) == len(entries)
    assert set(brought) <= {name for _, name, _ in _references(objects)}
    assert set(brought).isdisjoint(item["metadata"]["name"] for item in of_kind(objects, "Secret"))


def _brought(objects: list[Object]) -> list[str]:
    """The Secrets that the External Secrets operator makes."""
    return [item["spec"]["target"]["name"] for item in of_kind(objects, "ExternalSecret")]


def _given(values: Object, paths: list[str]) -> Iterator[str]:
    for path in paths:
        value: Any = values
        for part in path.split("."):
            value = value.get(part, {})
        if isinstance(value, list):
            yield from (entry["name"] for entry in value)
        elif value:
            yield value


def _references(node: Any) -> Iterator[tuple[str, str, set[str]]]:
    """Kind and name of all objects that are referred to, and which of their keys are read."""
    if isinstance(node, list):
        for item in node:
            yield from _references(item)
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        if name in ("secretKeyRef", "configMapKeyRef"):
            yield _kind(name), value["name"], {value["key"]}
        elif name in ("secretRef", "configMapRef"):
            yield _kind(name), value["name"], set()
        elif name == "configMap":
            yield "ConfigMap", value["name"], {entry["key"] for entry in value.get("items", [])}
        elif name == "secretName":
            yield "Secret", value, {entry["key"] for entry in node.get("items", [])}
        elif name == "claimName":
            yield "PersistentVolumeClaim", value, set()
        elif name == "serviceAccountName":
            yield "ServiceAccount", value, set()
        elif name == "imagePullSecrets":
            yield from (("Secret", entry["name"], set()) for entry in value)
        else:
            yield from _references(value)


def _kind(reference: str) -> str:
    return "Secret" if reference.startswith("secret") else "ConfigMap"


def test_mounted_volumes_are_there(objects):
    for item in of_kind(objects, "Deployment", "StatefulSet", "Job"):
        claims = item["spec"].get("volumeClaimTemplates", [])
        pod = item["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in claims}
        for container in pod["containers"]:
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(mounts)) == len(mounts)
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_secrets_come_by_reference_only(objects):
    for container in containers(objects):
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in ("KEY", "TOKEN", "AUTH", "REDIS_URL")):
                is_file = variable["name"].endswith("_FILE")
                assert is_file or set(variable["valueFrom"]) == {"secretKeyRef"}
    own = [value for s in of_kind(objects, "Secret") for value in s["stringData"].values()]
    others = str([item for item in objects if item["kind"] != "Secret"])
    assert not any(value in others for value in own)


def test_network_policies_let_through_what_the_code_connects_to(values, objects):
    connections = list(_connections(values, objects))
    assert connections
    for source, service, port in connections:
        reached = behind(objects, service, port)
        assert reached
        for pod, number in reached:
            assert lets_through(objects, source, Peer.of(pod), number)


def _connections(values: Object, objects: list[Object]) -> Iterator[tuple[Peer, str, int | str]]:
    """Source, Service and port of all connections to pods, read from what is configured."""
    for pod in pods(objects):
        for container in pod["spec"]["containers"]:
            for variable in container["env"]:
                if variable["name"] in ("CWPO_URL", "CWPO_FORMER_URL"):
                    yield Peer.of(pod), *_service(variable["value"])
                if variable["name"] == "CWPO_REDIS_URL":
                    secret = variable["valueFrom"]["secretKeyRef"]["name"]
                    for item in of_kind(objects, "Secret"):
                        if item["metadata"]["name"] == secret:
                            yield Peer.of(pod), *_service(item["stringData"]["url"])
    for item in of_kind(objects, "ScaledObject"):
        keda = Peer({"app": "keda-operator"}, namespace="keda")
        yield keda, *_service(item["spec"]["triggers"][0]["metadata"]["url"])
    for item in of_kind(objects, "ServiceMonitor"):
        prometheus = Peer({"app": "prometheus"}, namespace="monitoring")
        for service in _monitored(objects, item):
            yield prometheus, service["metadata"]["name"], item["spec"]["endpoints"][0]["port"]
    for item in of_kind(objects, "Ingress"):
        backend = item["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        for namespace in ("ingress-nginx", "traefik"):
            proxy = Peer({"app": "proxy"}, namespace=namespace)
            yield proxy, backend["name"], backend["port"]["name"]
    for item in of_kind(objects, "HTTPRoute"):
        backend = item["spec"]["rules"][0]["backendRefs"][0]
        yield Peer({"app": "envoy"}, namespace="gateways"), backend["name"], backend["port"]


def _service(url: str) -> tuple[str, int]:
    """Name and port of the Service that a URL of this namespace names."""
    parts = urlsplit(url)
    service, namespace, *_ = [*str(parts.hostname).split("."), NAMESPACE]
    assert namespace == NAMESPACE
    return service, parts.port or 80


def test_network_policies_let_out_what_the_code_needs_and_nothing_else(values, objects):
    is_open = not values.get("networkPolicy", {}).get("enabled", True)
    annotator, store = values["annotator"], values.get("store", {})
    is_here = annotator.get("backend") == "null" or annotator.get("model", "").startswith("/")
    is_external = values.get("redis", {}).get("mode") == "external"
    needs = {
        # The former annotator of these values is on the Hub.
        443: {
            "service": "url" in store or not is_here,
            "former": "url" in store or annotator.get("backend") != "null",
            "worker": "url" in store,
        },
        6379: dict.fromkeys(("service", "former", "worker"), is_external),
        8000: dict.fromkeys(("service", "former"), "CWPO_VLLM_URL" in str(values)),
        # The cloud's own service, which gives credentials to whoever reaches it.
        80: {},
    }
    outside, metadata = Peer(address="203.0.113.7"), Peer(address="169.254.169.254")
    resolver = Peer({"k8s-app": "kube-dns"}, namespace="kube-system")
    for pod in pods(objects):
        source, part = Peer.of(pod), pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for port, parts in needs.items():
            expected = is_open or parts.get(part, False)
            assert lets_through(objects, source, outside, port) == expected
        assert lets_through(objects, source, metadata, 80) == is_open
        for protocol in ("UDP", "TCP"):
            resolves = lets_through(objects, source, resolver, 53, protocol)
            assert resolves == (is_open or part in ("service", "former", "worker", "test"))
            assert lets_through(objects, source, outside, 53, protocol) == is_open


def test_network_policies_keep_strangers_out(values, objects):
    if not of_kind(objects, "NetworkPolicy"):
        assert values["networkPolicy"]["enabled"] is False
        return
    neighbour = Peer({"app": "web"})
    elsewhere = Peer({"app": "web"}, namespace="other")
    outside = Peer(address="203.0.113.7")
    is_open = "allowFrom" in values.get("networkPolicy", {})
    for pod in pods(objects):
        is_service = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "service"
        for port in (6379, 8000, 8001):
            is_served = is_service and port != 6379
            assert lets_through(objects, neighbour, Peer.of(pod), port) == is_served
            assert lets_through(objects, elsewhere, Peer.of(pod), port) == (is_served and is_open)
            assert not lets_through(objects, outside, Peer.of(pod), port)


def test_labels_name_the_release_and_the_part(values, objects):
    for item in objects:
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "demo"
        assert re.fullmatch(r"[a-z]+", labels["app.kubernetes.io/component"])
        assert values.get("commonLabels", {}).items() <= labels.items()
