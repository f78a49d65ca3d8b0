from datetime import UTC, datetime
from typing import get_args

import pytest

from cwpo.types import FINAL_STATES, Job, JobState
from cwpo_worker.errors import IllegalTransitionError
from cwpo_worker.jobs.record import TRANSITIONS, JobRecord

STATES = get_args(JobState)


def record(state: JobState) -> JobRecord:
    return JobRecord(
        id="job-1", state=state, file_id="file-1", created_at=datetime.now(UTC), shard_rows=1
    )


def test_every_state_has_its_row_and_from_the_final_ones_a_job_is_at_most_resumed():
    assert set(TRANSITIONS) == set(STATES)
    after_the_end = {state: TRANSITIONS[state] for state in FINAL_STATES}
    assert after_the_end == {
        "completed": frozenset(),
        "completed_with_errors": frozenset(),
        "failed": {"validating"},
        "cancelled": {"validating"},
    }
    assert all(TRANSITIONS[state] for state in set(STATES) - FINAL_STATES)


@pytest.mark.parametrize("state", STATES)
def test_a_record_moves_where_the_table_says_and_nowhere_else(state):
    for following in STATES:
        if following in TRANSITIONS[state]:
            moved = record(state).moved(following)
            assert moved.state == following
            assert (moved.finished_at is not None) == (following in FINAL_STATES)
        else:
            with pytest.raises(IllegalTransitionError, match=f"is {state}"):
                record(state).moved(following)


def test_from_every_state_a_job_can_end():
    for state in STATES:
        reached, frontier = set(), {state}
        while frontier:
            reached |= frontier
            frontier = set().union(*(TRANSITIONS[s] for s in frontier)) - reached
        assert reached & FINAL_STATES


def test_what_is_shown_is_a_job_and_no_more():
    shown = record("queued").model_copy(update={"owner": "somebody"}).public()
    assert type(shown) is Job
    assert "somebody" not in shown.model_dump_json()
