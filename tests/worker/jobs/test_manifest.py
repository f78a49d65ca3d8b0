"""The manifest, which every task of a job reads."""

from pathlib import Path

from cwpo_worker.jobs.manifest import JobFolder, Manifest

OLD = Path(__file__).parents[2] / "compatibility/0.1/up/store/jobs/job-4dcf51e5c0a23c2c082841b6"


def test_it_does_not_grow_with_the_job(house, monkeypatch):
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 1)
    sizes = []
    for rows in (1, 99):
        job_id = house.submit(house.rows(rows))
        house.plan(job_id)
        manifest = JobFolder(job_id).read_manifest(house.store)
        assert (manifest.rows, manifest.shard_count) == (rows, rows)
        sizes.append(len(house.store.read(JobFolder(job_id).manifest)))
    assert sizes[1] - sizes[0] == 2  # A digit for the rows, and one for the shards.


def test_one_that_lists_the_shards_is_read():
    manifest = Manifest.model_validate_json((OLD / "manifest.json").read_bytes())
    assert (manifest.rows, manifest.rejected) == (120, 1)
    assert list(manifest.numbers) == [0, 1, 2, 3, 4]
