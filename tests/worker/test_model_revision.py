"""Jobs on a fleet whose replicas host different annotators: none mixes them, and none is lost."""

import itertools
import socket
import threading
from contextlib import ExitStack, suppress
from functools import partial

import pytest

from cwpo import Client, Triplet
from cwpo.cli import run
from cwpo.commands.batch_jobs import Jobs
from cwpo.datasets.weighted import weighted_row
from cwpo.errors import ConflictError
from cwpo.types import ModelRef
from cwpo_annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.scores import Scores
from harness import House, serving

pytestmark = pytest.mark.slow

REVISIONS = ("straight", "opposite")


class Opposite(NullBackend):
    """Prefers what the null backend does not."""

    def score_pairs(self, pairs):
        return Scores(-super().score_pairs(pairs).values)


def annotator(revision):
    backend = Opposite() if revision == "opposite" else NullBackend()
    return Annotator(NullEncoder(), backend, ModelRef(name="a", revision=revision))


class Balancer:
    """A load balancer that gives each new connection to the next replica."""

    def __init__(self):
        self.replicas = []
        self._turns = itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                replica = self.replicas[next(self._turns) % len(self.replicas)]
                host, port = replica.url.removeprefix("http://").split(":")
                server = socket.create_connection((host, int(port)))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Fleet:
    """A house whose service is a balancer before a replica for each revision."""

    def __init__(self, house, balancer, replicas):
        self.house = house
        self._balancer = balancer
        self._replicas = replicas

    def host(self, *revisions):
        """From now on, replicas of these revisions answer, on new connections."""
        self._balancer.replicas = [self._replicas[revision] for revision in revisions]
        self.house.client.close()
        self.house.move_in(self._balancer)

    def replica(self, revision):
        """The service that hosts this revision."""
        return self._replicas[revision]

    def begin(self, revision, rows):
        """A job with one finished shard, by the revision; the other shards wait in the queue."""
        self.host(revision)
        job_id = self.house.submit(rows)
        self.house.plan(job_id)
        self.house.annotate(job_id, 0)
        return job_id


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 8)
    with ExitStack() as stack:
        house = House(tmp_path)
        stack.callback(house.close)
        places = {"redis_url": house.valkey.url, "store_url": house.store_url}
        replicas = {
            revision: stack.enter_context(serving(partial(annotator, revision), **places))
            for revision in REVISIONS
        }
        balancer = Balancer()
        stack.callback(balancer.close)
        house.move_in(balancer)
        yield Fleet(house, balancer, replicas)


def alone(revision, rows):
    """The dataset of a job that has the revision for itself."""
    triplets = [Triplet(**row) for row in rows]
    return [
        weighted_row(*pair)
        for pair in zip(triplets, annotator(revision).annotate(triplets), strict=True)
    ]


def test_two_jobs_on_a_mixed_fleet_are_each_annotated_by_one_revision(fleet):
    house = fleet.house
    rows = house.rows(64)
    jobs = {revision: fleet.begin(revision, rows) for revision in REVISIONS}
    fleet.host(*REVISIONS)
    unpinned = house.submit(rows)
    for _ in range(2):
        house.start_worker()
    for revision, job_id in jobs.items():
        job = house.wait(job_id)
        assert (job.state, job.error) == ("completed", None)
        assert job.model == ModelRef(name="a", revision=revision)
        assert house.results(job_id) == alone(revision, rows)
    job = house.wait(unpinned)
    assert job.state == "completed", job.error
    assert house.results(unpinned) == alone(job.model.revision, rows)


def test_a_job_goes_on_with_the_former_annotator_beside_the_new_one(fleet):
    house = fleet.house
    rows = house.rows(64)
    begun = fleet.begin("straight", rows)
    fleet.host("opposite")
    later = house.submit(rows)
    house.start_worker("--former-url", fleet.replica("straight").url)
    for job_id, revision in ((begun, "straight"), (later, "opposite")):
        job = house.wait(job_id)
        assert (job.state, job.error, job.model.revision) == ("completed", None, revision)
        assert house.results(job_id) == alone(revision, rows)


def test_a_job_of_neither_annotator_waits(fleet):
    house = fleet.house
    job_id = fleet.begin("straight", house.rows(24))
    fleet.host("opposite")
    house.start_worker("--former-url", fleet.replica("opposite").url)
    assert house.wait_for(job_id, lambda job: job.waiting is not None).state == "running"


def test_a_job_waits_until_its_revision_is_hosted_again(fleet, tmp_path, capsys):
    house = fleet.house
    rows = house.rows(24)
    job_id = fleet.begin("straight", rows)
    fleet.host("opposite")
    with (tmp_path / "log").open("wb") as log:
        house.start_worker(stderr=log)
        job = house.wait_for(job_id, lambda job: job.waiting is not None)
        assert (job.state, job.error) == ("running", None)
        assert "hosts annotator a at revision opposite" in job.waiting.reason
        run(Jobs, ["show", job_id, "--url", house.url], "cwpo jobs")
        assert "  waits for its annotator since 20" in capsys.readouterr().out
        # Other jobs go on.
        other = house.wait(house.submit(rows))
        assert (other.state, other.model.revision) == ("completed", "opposite")
        assert house.ledger.totals().waiting_for_model == 1
        fleet.host(*REVISIONS)
        job = house.wait(job_id)
    assert (job.state, job.waiting) == ("completed", None)
    assert house.results(job_id) == alone("straight", rows)
    assert "waits for the service: 503" in (tmp_path / "log").read_text()


def test_a_job_that_has_waited_too_long_fails_and_is_resumed_by_either_way(fleet, capsys):
    house = fleet.house
    rows = house.rows(24)
    first, second = (fleet.begin("straight", rows) for _ in range(2))
    fleet.host("opposite")
    house.start_worker("--model-wait", "0")
    with Client(house.url) as client:
        for job_id in (first, second):
            job = house.wait(job_id)
            assert job.state == "failed"
            assert "has hosted the job's annotator a straight for 0 s" in job.error
            assert "hosts annotator a at revision opposite" in job.error
            assert f"`cwpo jobs resume {job_id} --repin`" in job.error
        run(Jobs, ["resume", first, "--repin", "--url", house.url], "cwpo jobs")
        assert capsys.readouterr().out.startswith(f"{first}  validating")
        job = house.wait(first)
        assert (job.state, job.model.revision) == ("completed", "opposite")
        assert house.results(first) == alone("opposite", rows)
        with pytest.raises(ConflictError, match="only a failed or cancelled job"):
            client.jobs.resume(first, repin=True)
        fleet.host("straight")
        assert client.jobs.resume(second).model.revision == "straight"
        job = house.wait(second)
        assert (job.state, job.model.revision) == ("completed", "straight")
        assert house.results(second) == alone("straight", rows)
