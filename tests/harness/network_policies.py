"""Which connections NetworkPolicies let through, by the rules of the Kubernetes API."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from manifests import NAMESPACE, Object, named_ports, of_kind


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod of some namespace, or an address outside the cluster.

    Args:
        pod: the rendered pod, for the names of its ports; None for those of others.
    """

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str | None = None
    pod: Object | None = None

    @classmethod
    def of(cls, pod: Object) -> Peer:
        """A pod of the release."""
        return cls(labels=pod["metadata"]["labels"], pod=pod)


def lets_through(
    objects: list[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether the policies of the source's egress and of the target's ingress allow a connection.

    A pod that no policy of a direction selects is not isolated in this direction.
    """
    ends = (("Egress", "to", source, target), ("Ingress", "from", target, source))
    for direction, peers, end, other in ends:
        policies = [item["spec"] for item in of_kind(objects, "NetworkPolicy")]
        isolating = [policy for policy in policies if _isolates(policy, direction, end)]
        rules = [rule for policy in isolating for rule in policy.get(direction.lower(), [])]
        allowed = any(
            _has_port(rule, target, port, protocol) and _has_peer(rule.get(peers), other)
            for rule in rules
        )
        if isolating and not allowed:
            return False
    return True


def _isolates(policy: Object, direction: str, end: Peer) -> bool:
    if end.address is not None or end.namespace != NAMESPACE:
        return False
    return direction in policy["policyTypes"] and selects(policy["podSelector"], end.labels)


def _has_port(rule: Object, target: Peer, port: int, protocol: str) -> bool:
    entries = rule.get("ports")
    return not entries or any(_is_port(entry, target, port, protocol) for entry in entries)


def _has_peer(entries: list[Object] | None, other: Peer) -> bool:
    return not entries or any(_is_peer(entry, other) for entry in entries)


def _is_port(entry: Object, target: Peer, port: int, protocol: str) -> bool:
    if entry.get("protocol", "TCP") != protocol:
        return False
    if "port" not in entry:
        return True
    if isinstance(entry["port"], str):
        return target.pod is not None and named_ports(target.pod).get(entry["port"]) == port
    return bool(entry["port"] <= port <= entry.get("endPort", entry["port"]))


def _is_peer(entry: Object, other: Peer) -> bool:
    if "ipBlock" in entry:
        if other.address is None:
            return False
        excepted = [ip_network(block) for block in entry["ipBlock"].get("except", [])]
        address = ip_address(other.address)
        inside = address in ip_network(entry["ipBlock"]["cidr"])
        return inside and not any(address in block for block in excepted)
    if other.address is not None:
        return False
    if "namespaceSelector" in entry:
        labels = {"kubernetes.io/metadata.name": other.namespace}
        in_namespace = selects(entry["namespaceSelector"], labels)
    else:
        in_namespace = other.namespace == NAMESPACE
    return in_namespace and selects(entry.get("podSelector", {}), other.labels)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches; of expressions, the charts use In only."""
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
