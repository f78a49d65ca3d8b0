"""Measures of batch jobs, read from the queue whenever Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cwpo.types import FINAL_STATES, JobState
from cwpo_worker.activity import Activity
from cwpo_worker.errors import QueueUnavailableError
from cwpo_worker.ledger import Ledger


class JobMetrics(Collector):
    """What every service of an installation says alike: take the max of them, not the sum."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not ask the queue."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The measures; only `cwpo_queue_up` while the queue cannot be used."""
        up = GaugeMetricFamily("cwpo_queue_up", "Whether the job queue answers")
        try:
            activity = self._ledger.activity()
        except QueueUnavailableError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from _jobs(activity)
        yield from _tasks(activity)


def _jobs(activity: Activity) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("cwpo_jobs", "Jobs that have not ended", labels=["state"])
    ended = CounterMetricFamily("cwpo_jobs_ended", "Jobs that have ended", labels=["state"])
    for state in get_args(JobState):
        if state in FINAL_STATES:
            ended.add_metric([state], activity.totals.get(f"jobs_{state}", 0))  # type: ignore[call-overload]
        else:
            jobs.add_metric([state], activity.jobs[state])
    rows = CounterMetricFamily("cwpo_job_rows", "Rows of finished shards", labels=["result"])
    rows.add_metric(["annotated"], activity.totals.get("rows_annotated", 0))
    rows.add_metric(["failed"], activity.totals.get("rows_failed", 0))
    yield from (jobs, ended, rows)


def _tasks(activity: Activity) -> Iterator[Metric]:
    tasks = GaugeMetricFamily(
        "cwpo_tasks", "Tasks of jobs: a plan, a merge, or up to eight shards", labels=["state"]
    )
    for state in ("waiting", "delayed", "running"):
        tasks.add_metric([state], getattr(activity, state))
    yield tasks
    yield GaugeMetricFamily(
        "cwpo_task_wait_seconds",
        "How long the first task in line has waited",
        value=activity.waited_seconds,
    )
    yield CounterMetricFamily(
        "cwpo_task_retries",
        "Tasks that were tried again, because they failed or the service was busy",
        value=activity.totals.get("retries", 0),
    )
