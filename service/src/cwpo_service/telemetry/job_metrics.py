"""Prometheus metrics of batch jobs, read from the job queue at every scrape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cwpo.types import FINAL_STATES, JobState
from cwpo_worker.errors import QueueUnavailableError
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.queue.totals import Totals


class JobMetrics(Collector):
    """Metrics of all jobs in the queue.

    All services that share a queue report the same values: take their maximum, not their sum.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering this collector does not read the queue."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics; only `cwpo_queue_up` if the queue cannot be reached."""
        up = GaugeMetricFamily("cwpo_queue_up", "Whether the job queue can be reached: 1 or 0")
        try:
            totals = self._ledger.totals()
        except QueueUnavailableError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from _jobs(totals)
        yield from _tasks(totals)
        yield from _workers(totals)


def _jobs(totals: Totals) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("cwpo_jobs", "Batch jobs that have not ended", labels=["state"])
    ended = CounterMetricFamily("cwpo_jobs_ended", "Batch jobs that have ended", labels=["state"])
    for state in get_args(JobState):
        if state in FINAL_STATES:
            ended.add_metric([state], totals.counts.get(f"jobs_{state}", 0))  # type: ignore[call-overload]
        else:
            jobs.add_metric([state], totals.jobs[state])
    waiting = GaugeMetricFamily(
        "cwpo_jobs_waiting_for_model",
        "Batch jobs that wait because no replica of the service hosts their annotator",
        value=totals.waiting_for_model,
    )
    rows = CounterMetricFamily(
        "cwpo_job_rows", "Rows of batch jobs in finished shards", labels=["result"]
    )
    rows.add_metric(["annotated"], totals.counts.get("rows_annotated", 0))
    rows.add_metric(["failed"], totals.counts.get("rows_failed", 0))
    yield from (jobs, ended, waiting, rows)


def _tasks(totals: Totals) -> Iterator[Metric]:
    tasks = GaugeMetricFamily(
        "cwpo_tasks",
        "Tasks of batch jobs: each a plan, a merge, or up to eight shards",
        labels=["state"],
    )
    states = ("waiting", "delayed", "running", "unqueued")
    for state in states:
        tasks.add_metric([state], getattr(totals, state))
    yield tasks
    # Without a label, as KEDA reads it.
    yield GaugeMetricFamily(
        "cwpo_tasks_unfinished",
        "Tasks of batch jobs in all states, those whose turn has not come among them",
        value=sum(getattr(totals, state) for state in states),
    )
    yield GaugeMetricFamily(
        "cwpo_tasks_refused",
        "Tasks of batch jobs that wait because the service refused the API key of their worker",
        value=totals.refused,
    )
    yield GaugeMetricFamily(
        "cwpo_task_wait_seconds",
        "Seconds that the first waiting task of batch jobs has waited",
        value=totals.waited_seconds,
    )
    yield CounterMetricFamily(
        "cwpo_task_retries",
        "Tasks of batch jobs tried again because they failed or the service was busy",
        value=totals.counts.get("retries", 0),
    )


def _workers(totals: Totals) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "cwpo_workers",
        "Workers; one that was killed counts for up to two minutes more",
        value=totals.workers,
    )
    yield GaugeMetricFamily(
        "cwpo_reconciler_up",
        "Whether a worker has repaired the state of jobs in the last minute: 1 or 0",
        value=totals.is_reconciled,
    )
