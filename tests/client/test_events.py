"""The events of a job, read line by line without a socket."""

import json

import pytest

from cwpo.errors import ConnectionFailedError, api_error
from cwpo.events import JobEvents
from cwpo.types import Problem


def lines_of(event_id, state):
    job = {"id": "job-1", "state": state, "created_at": "2026-01-01T00:00:00Z"}
    return [f"id: {event_id}", "event: job", f"data: {json.dumps(job)}", ""]


def states(events, lines):
    return [job.state for line in lines if (job := events.feed(line)) is not None]


def asked_after(events):
    return events.request().headers.get("Last-Event-ID")


def test_what_broke_off_is_asked_for_behind_the_last_whole_event():
    events = JobEvents("job-1", limit=4)
    assert asked_after(events) is None
    lines = [*lines_of("1.0", "queued"), ": still here", "", *lines_of("2.0", "running")[:-1]]
    assert states(events, lines) == ["queued"]
    assert events.delay(ConnectionFailedError("cut")) > 0
    assert asked_after(events) == "1.0"
    assert states(events, lines_of("2.0", "running")) == ["running"]
    assert asked_after(events) == "2.0"
    assert not events.ended
    assert states(events, lines_of("3.9", "completed")) == ["completed"]
    assert events.ended


def test_connections_without_a_word_are_given_up_and_a_word_is_new_hope():
    events = JobEvents("job-1", limit=2)
    events.delay(None)
    events.delay(None)
    states(events, lines_of("1.0", "running"))
    events.delay(None)
    events.delay(None)
    with pytest.raises(ConnectionFailedError, match="the events of job job-1 before it had ended"):
        events.delay(None)


def test_what_time_does_not_mend_ends_the_events():
    gone = api_error(Problem(title="Not Found", status=404, detail="no job"))
    with pytest.raises(type(gone)):
        JobEvents("job-1", limit=4).delay(gone)
