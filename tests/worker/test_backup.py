"""Back up and restore as the runbook says: a copy of the store is all that is needed."""

from __future__ import annotations

import shutil

import pytest

from harness import House


@pytest.mark.slow
def test_a_copy_of_the_store_brings_back_ended_and_running_jobs(house, tmp_path, service):
    rows = house.rows(5000)
    ended, running = house.submit(rows[:300]), house.submit(rows)
    house.plan(ended)
    house.annotate(ended, 0)
    house.merge(ended)
    house.plan(running)
    house.annotate(running, 0)
    # While the original is at work, as a snapshot is made.
    backup = shutil.copytree(house.store_folder, tmp_path / "backup")
    house.start_worker()
    house.wait(running)
    asked = house.service.requests

    restored = House(tmp_path / "elsewhere", service, str(backup))
    try:
        restored.reconcile()
        assert restored.ledger.get(ended, owner=None).state == "completed"
        assert restored.results(ended) == restored.expected(rows[:300])
        restored.start_worker()
        assert restored.wait(running).state == "completed"
        assert restored.results(running) == restored.expected(rows)
        # The shard that was done before is not asked for again, but the others are.
        assert asked < restored.service.requests < 2 * asked
    finally:
        restored.close()
