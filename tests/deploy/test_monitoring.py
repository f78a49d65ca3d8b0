"""Alerts and dashboard: they ask for metrics that the service has, and fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import helm_python
import pytest
import yaml
from manifests import CHART, Object, named, of_kind, rendered

MONITORED = {
    "annotator": {"model": "acme/annotator"},
    "serviceMonitor": {"enabled": True},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Models"}},
}
# The labels that the Prometheus operator gives to what a ServiceMonitor finds.
SOURCE = 'namespace="team", job="demo-cwpo"'
MINUTES = 60

# Two replicas and their values at each minute, in Prometheus's notation for tests.
HEALTHY = {
    ("cwpo_requests_total", 'route="/annotate", status="200", pod="1"'): "0+600x60",
    ("cwpo_requests_total", 'route="/annotate", status="503", pod="2"'): "0+6x60",
    ("cwpo_requests_total", 'route="/health/ready", status="503", pod="2"'): "0+600x60",
    ("cwpo_queue_age_seconds", 'pod="1"'): "300x60",
    ("cwpo_queue_age_seconds", 'pod="2"'): "2x60",
    ("cwpo_confidence_drift", 'pod="1"'): "0.03x60",
    ("cwpo_queue_up", 'pod="1"'): "1x60",
    ("cwpo_queue_up", 'pod="2"'): "0x60",
    ("cwpo_reconciler_up", 'pod="1"'): "1x60",
    ("cwpo_workers", 'pod="1"'): "2x60",
    ("cwpo_task_wait_seconds", 'pod="1"'): "60x60",
}
JOB_METRICS = ("cwpo_reconciler_up", "cwpo_workers", "cwpo_task_wait_seconds")
# Of each alert, what goes wrong from the 30th minute on.
WRONG: dict[str, dict[tuple[str, str], str]] = {
    "CwpoErrors": {
        ("cwpo_requests_total", 'route="/annotate", status="503", pod="2"'): "0x30 60+60x30"
    },
    "CwpoSaturated": {("cwpo_queue_age_seconds", 'pod="2"'): "2x29 90x31"},
    "CwpoConfidenceDrift": {("cwpo_confidence_drift", 'pod="1"'): "0.03x29 0.2x31"},
    "CwpoQueueDown": {
        ("cwpo_queue_up", 'pod="1"'): "1x29 0x31",
        **{(name, 'pod="1"'): "1x29 _x31" for name in JOB_METRICS},
    },
    "CwpoReconcilerDown": {("cwpo_reconciler_up", 'pod="1"'): "1x29 0x31"},
    "CwpoNoWorker": {("cwpo_workers", 'pod="1"'): "2x29 0x31"},
    "CwpoTasksWait": {("cwpo_task_wait_seconds", 'pod="1"'): "60x29 1800x31"},
}


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return rendered(MONITORED)


@pytest.fixture(scope="module")
def rules(objects) -> list[Object]:
    (item,) = of_kind(objects, "PrometheusRule")
    (group,) = item["spec"]["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def dashboard(objects) -> Object:
    data = named(objects, "ConfigMap", "demo-cwpo-dashboard")["data"]
    (text,) = data.values()
    return json.loads(text)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> set[str]:
    """The names of all series that a service has which takes jobs and has annotated."""
    pytest.importorskip("cwpo_service")
    from cwpo_annotator.annotator import Annotator
    from harness import furnished

    def measured() -> Annotator:
        annotator = Annotator.null()
        annotator.confidence_quantiles = [0.0, 1.0]
        return annotator

    with furnished(tmp_path_factory.mktemp("house"), measured) as house:
        triplet = {"prompt": "a question", "response_a": "an answer", "response_b": "a reply"}
        assert house.service.annotate(*[triplet] * 200).status_code == 200
        text = house.service.http.get("/metrics").text
    names = set(re.findall(r"(?m)^(cwpo_\w+)", text))
    # A series with labels appears with its first event.
    return names | set(re.findall(r"(?m)^# TYPE (\w+) counter", text))


def asked(queries: list[str]) -> set[str]:
    return {name for query in queries for name in re.findall(r"\bcwpo_\w+", query)}


def test_alerts_ask_for_metrics_that_the_service_has(rules, exported):
    queries = [rule["expr"] for rule in rules]
    assert all(asked([query]) for query in queries)
    assert asked(queries) <= exported


def test_the_dashboard_asks_for_metrics_that_the_service_has(dashboard, exported):
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(asked([query]) for query in queries)
    assert asked(queries) <= exported
    panels = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(panels)) == len(panels)


def test_a_release_is_not_mistaken_for_another(rules):
    for rule in rules:
        series = re.findall(r"cwpo_\w+\{ ?([^}]*)\}", rule["expr"])
        assert len(series) == len(re.findall(r"cwpo_", rule["expr"]))
        assert all(labels.startswith(SOURCE) for labels in series)


def test_every_alert_says_how_bad_it_is_and_what_to_do(rules):
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert "demo-cwpo" in rule["annotations"]["description"]


def test_the_runbook_says_what_to_do_at_each_alert_and_where_to_look(rules, dashboard):
    text = (CHART.parents[2] / "docs" / "runbook.md").read_text()
    assert {rule["alert"] for rule in rules} == set(re.findall(r"(?m)^\| `(Cwpo\w+)`", text))
    titles = {panel["title"] for panel in dashboard["panels"]}
    named_there = set(re.findall(r"\*([A-Z][^*]+)\*", text))
    assert named_there
    assert named_there <= titles


def test_labels_by_which_they_are_found(objects):
    (rule,) = of_kind(objects, "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    dashboard = named(objects, "ConfigMap", "demo-cwpo-dashboard")["metadata"]
    assert dashboard["labels"]["grafana_dashboard"] == "1"
    assert dashboard["annotations"] == {"grafana_folder": "Models"}


def test_nothing_is_monitored_unasked():
    objects = rendered({"annotator": {"model": "acme/annotator"}})
    assert of_kind(objects, "PrometheusRule", "ServiceMonitor", "ConfigMap") == []


def test_alerts_on_nothing_are_refused():
    with pytest.raises(helm_python.HelmRenderError, match=r"set serviceMonitor\.enabled"):
        rendered(MONITORED | {"serviceMonitor": {"enabled": False}})


def test_thresholds_are_those_of_the_values(rules):
    values = {"errorShare": 0.25, "queueAgeSeconds": 7, "taskWaitSeconds": 3600}
    values |= {"confidenceDrift": 0.5}
    changed = MONITORED | {"prometheusRule": {"enabled": True, **values}}
    (item,) = of_kind(rendered(changed), "PrometheusRule")
    (group,) = item["spec"]["groups"]
    bounds = {rule["expr"].rpartition("> ")[2] for rule in group["rules"] if "> " in rule["expr"]}
    assert bounds == {"0.25", "7", "3600", "0.5"}
    assert yaml.safe_load((CHART / "values.yaml").read_text())["prometheusRule"]["errorShare"] < 1
    assert [rule["alert"] for rule in group["rules"]] == [rule["alert"] for rule in rules]


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    return path


@pytest.fixture(scope="module")
def rule_file(rules, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alerts") / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "cwpo", "rules": rules}]}))
    return path


def test_prometheus_takes_the_rules(promtool, rule_file, rules):
    result = run(promtool, "check", "rules", rule_file)
    assert f"SUCCESS: {len(rules)} rules found" in result


def test_an_alert_fires_alone_and_not_at_once(promtool, rule_file, rules):
    """Each goes wrong at the 30th minute, fires by the 60th, and is pending half of its `for`."""
    assert WRONG.keys() == {rule["alert"] for rule in rules}
    tests = [scenario({}, [(MINUTES, None)])]
    for rule in rules:
        halfway = 30 + int(rule["for"].removesuffix("m")) // 2
        last = MINUTES if rule["for"] != "30m" else MINUTES + 1
        tests.append(scenario(WRONG[rule["alert"]], [(halfway, None), (last, rule["alert"])]))
    document = {"rule_files": [str(rule_file)], "evaluation_interval": "1m", "tests": tests}
    path = rule_file.with_name("tests.yaml")
    path.write_text(yaml.safe_dump(document))
    assert "SUCCESS" in run(promtool, "test", "rules", path)


def scenario(wrong: dict[tuple[str, str], str], firing: list[tuple[int, str | None]]) -> Object:
    series = {**HEALTHY, **wrong}
    return {
        "interval": "1m",
        "input_series": [
            {"series": f"{name}{{{SOURCE}, {labels}}}", "values": values}
            for (name, labels), values in series.items()
        ],
        "promql_expr_test": list(expectations(firing)),
    }


def expectations(firing: list[tuple[int, str | None]]) -> Iterator[Object]:
    for minute, alert in firing:
        labels = f'{{alertname="{alert}"}}'
        yield {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minute}m",
            "exp_samples": [] if alert is None else [{"labels": labels, "value": 1}],
        }


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
