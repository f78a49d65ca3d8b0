"""The SDK, sync and async: against a real service, and against a server that is busy at first."""

import io
import json
import threading
import time
from base64 import b64encode
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import CwpoError, RankItem, Triplet
from cwpo.errors import (
    APIError,
    ConflictError,
    ConnectionFailedError,
    DatasetError,
    InvalidRequestError,
    JobFailedError,
    ModelRevisionError,
    NoAnswerInTimeError,
    NotFoundError,
    OverloadedError,
    ServiceFailedError,
    TooLargeError,
    UnauthorizedError,
)
from cwpo.progress import Progress
from cwpo.types import ScoreItem
from cwpo_annotator import Annotator
from harness import UnsteadyService, furnished, labels_of, serving

KEY = "wonderland"
TRIPLETS = [
    Triplet(prompt=f"question {n}", response_a=f"answer {n}", response_b=f"reply {n}")
    for n in range(10)
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A service with a queue, a store and one key, and at most five triplets a request."""
    folder = tmp_path_factory.mktemp("house")
    keys = folder / "keys"
    keys.write_text(f"alice:{sha256(KEY.encode()).hexdigest()}\n")
    with furnished(folder, api_key=KEY, api_keys_file=keys, max_triplets=5) as house:
        yield house


@pytest.fixture
def ask(use, house):
    """`ask(lambda client: ...)` of the service, with its key."""
    return lambda call, **options: use(house.url, call, **{"api_key": KEY, **options})


def test_annotate_is_the_annotator_over_http(ask):
    answer = ask(lambda client: client.annotate(TRIPLETS[:5]))
    assert answer.annotations == labels_of(TRIPLETS[:5])
    assert answer.usage.triplets == 5
    assert answer.model.name == "null"


def test_a_long_input_goes_in_parts_and_comes_back_as_one(ask):
    answer = ask(lambda client: client.annotate(TRIPLETS, batch_size=3))
    assert answer.annotations == labels_of(TRIPLETS)
    assert [item.id for item in answer.annotations] == [str(n) for n in range(10)]
    assert answer.usage.triplets == 10


def test_triplets_of_a_prompt_are_sent_together(use):
    triplets = [
        Triplet(prompt=f"question {n % 4}", response_a=f"answer {n}", response_b=f"reply {n}")
        for n in range(12)
    ]
    service = UnsteadyService()
    in_threes = {"batch_size": 3, "priority": "batch"}
    answer = use(service.url, lambda client: client.annotate(triplets, **in_threes))
    service.stop()
    assert answer.annotations == labels_of(triplets)
    assert sorted(map(set, service.prompts), key=min) == [{f"question {n}"} for n in range(4)]


def test_all_parts_are_asked_of_the_revision_that_answered_the_first(use):
    def answered(number, revision):
        label = {"id": str(number), "preferred": "a", "confidence": 0.5, "score_a": 1, "score_b": 0}
        model = {"name": "m", "revision": revision}
        usage = {"triplets": 1, "tokens": 1}
        return 200, {}, {"annotations": [label], "model": model, "usage": usage}

    hosted = 200, {}, {**MODEL, "revision": "r1", "max_body_bytes": 1000}
    with Script(hosted, answered(0, "r1"), answered(1, "r1")) as server:
        one_at_a_time = {"batch_size": 1, "concurrency": 1}
        use(server.url, lambda client: client.annotate(TRIPLETS[:2], **one_at_a_time))
        asked = [headers.get("x-model-revision") for headers, _ in server.requests]
    assert asked == [None, "r1", "r1"]
    # Two halves of a request that was too large are of one revision, too.
    with Script((413, {}, TOO_LARGE), answered(0, "r1"), answered(1, "r1")) as server:
        use(server.url, lambda client: client.annotate(TRIPLETS[:2]))
        asked = [headers.get("x-model-revision") for headers, _ in server.requests]
    assert asked == [None, None, "r1"]
    # A service that does not know the header answers by whatever it hosts.
    for answer, revision in (answered(0, "r1"), "r2"), (answered(0, "r2"), "r1"):
        with Script(answer) as server, pytest.raises(CwpoError, match=r"revision r\d .* where r\d"):
            use(
                server.url,
                lambda client, pin=revision: client.annotate(TRIPLETS[:1], revision=pin),
            )


def test_another_revision_is_waited_for_and_then_an_error_of_its_own(ask, use):
    items = [ScoreItem(prompt="why", response="so")]
    for call in (
        lambda client: client.annotate(TRIPLETS[:1], revision="older"),
        lambda client: client.score(items, revision="older"),
        lambda client: client.rank(RANKED, revision="older"),
    ):
        with pytest.raises(
            ModelRevisionError, match=r"at revision null,.* revision older"
        ) as error:
            ask(call, max_retries=0)
        assert not isinstance(error.value, OverloadedError)
    other = {**BUSY, "status": 503, "reason": "model_revision"}
    score = {"scores": [{"score": 1.0}], "model": {"name": "m", "revision": "r"}}
    score["usage"] = {"triplets": 1, "tokens": 1}
    with Script((503, {"Retry-After": 0}, other), (200, {}, score)) as server:
        use(server.url, lambda client: client.score(items, revision="r"), max_retries=1)
        assert [headers["x-model-revision"] for headers, _ in server.requests] == ["r", "r"]


def test_nothing_to_ask_is_one_line_and_no_request(use):
    for call in (
        lambda client: client.annotate([]),
        lambda client: client.score([]),
        lambda client: client.rank([]),
    ):
        with pytest.raises(CwpoError, match=r"nothing to send to /\w+: there are no rows$"):
            use("http://127.0.0.1:9", call)


def every(iterator):
    """What an iterator of either client yields."""
    if not hasattr(iterator, "__aiter__"):
        return list(iterator)

    async def collect():
        return [each async for each in iterator]

    return collect()


def every_label(client, rows, **options):
    """What annotate_iter yields, with or without asyncio."""
    return every(client.annotate_iter(rows, **options))


def test_rows_may_be_dictionaries_and_tables_under_names_of_their_own(ask):
    expected = labels_of(TRIPLETS)
    rows = [triplet.model_dump(exclude_none=True) for triplet in TRIPLETS]
    trl = [
        {"prompt": row["prompt"], "chosen": row["response_a"], "rejected": row["response_b"]}
        for row in rows
    ]
    others = [
        {"question": row["prompt"], "first": row["response_a"], "second": row["response_b"]}
        for row in rows
    ]
    names = {"prompt": "question", "response_a": "first", "response_b": "second"}
    assert ask(lambda client: client.annotate(rows)).annotations == expected
    assert ask(lambda client: client.annotate(trl)).annotations == expected
    assert ask(lambda client: client.annotate(iter(TRIPLETS))).annotations == expected
    table = pa.Table.from_pylist(others)
    assert ask(lambda client: client.annotate(table, columns=names)).annotations == expected
    assert ask(lambda client: every_label(client, others, columns=names)) == expected
    to_score = {"prompt": "question", "response": "first"}
    scores = ask(lambda client: client.score(others, columns=to_score))
    assert [score.score for score in scores.scores] == [label.score_a for label in expected]
    lists = [{"q": item.prompt, "responses": item.responses} for item in RANKED]
    answer = ask(lambda client: client.rank(lists, columns={"prompt": "q"}))
    assert answer.rankings == Annotator.null().rank(RANKED)
    with pytest.raises(DatasetError, match=r"the columns are question, first, second\. Say which"):
        ask(lambda client: client.annotate(others))
    with pytest.raises(DatasetError, match="row 0 is a RankItem: rows are dictionaries or Triplet"):
        ask(lambda client: client.annotate(RANKED))


def test_rows_that_are_not_valid_are_errors_in_their_places_and_not_sent(ask):
    good = TRIPLETS[0].model_dump(exclude_none=True)
    bad = [{**good, "response_b": 7}, {**good, "response_a": " "}, {"id": "x", "prompt": "p"}]
    surrogate = TRIPLETS[0].model_copy(update={"prompt": "\ud800"})
    rows = [bad[0], TRIPLETS[0], bad[1], bad[2], surrogate]
    labels = ask(lambda client: client.annotate(rows)).annotations
    assert [label.id for label in labels] == ["0", "1", "2", "x", "4"]
    assert labels[1].score_a == labels_of(TRIPLETS[:1])[0].score_a
    codes = [labels[at].error.code for at in (0, 2, 3, 4)]
    assert codes == ["invalid_row", "empty_response", "invalid_row", "invalid_text"]
    assert "response_b" in labels[0].error.detail
    assert ask(lambda client: every_label(client, rows)) == labels
    with pytest.raises(DatasetError, match="none of 3 rows is valid; row 0: response_b: "):
        ask(lambda client: client.annotate(bad))


def test_labels_of_an_endless_input_come_in_order_while_it_is_read(use, monkeypatch):
    """At most a window of rows, and those of the requests on their way, are read ahead."""
    monkeypatch.setattr("cwpo.resources.annotations.STREAMED_ROWS", 32)
    ahead = []
    given = taken = 0

    def rows():
        nonlocal given
        for given in range(1, 1001):
            ahead.append(given - taken)
            yield {
                "id": f"row-{given}",
                "prompt": f"{given % 7}",
                "response_a": "a",
                "response_b": "b",
            }

    def stream(client):
        nonlocal taken
        labels = client.annotate_iter(rows(), batch_size=8, concurrency=2)
        if not hasattr(labels, "__aiter__"):
            for taken, label in enumerate(labels, 1):
                assert label.id == f"row-{taken}"
            return None

        async def consume():
            nonlocal taken
            async for label in labels:
                taken += 1
                assert label.id == f"row-{taken}"

        return consume()

    with serving() as service:
        use(service.url, stream)
    assert taken == 1000
    # The first hundred rows are looked at for their columns.
    assert max(ahead) <= 100 + 2 * 32 + 8


def test_a_stream_that_is_left_early_reads_no_further(use, monkeypatch):
    monkeypatch.setattr("cwpo.resources.annotations.STREAMED_ROWS", 32)
    given = []

    def rows():
        for n in range(100_000):
            given.append(n)
            yield TRIPLETS[n % 10]

    def first(client):
        labels = client.annotate_iter(rows(), batch_size=8)
        if not hasattr(labels, "__aiter__"):
            return next(labels)

        async def take():
            try:
                return await anext(labels)
            finally:
                await labels.aclose()

        return take()

    with serving() as service:
        assert use(service.url, first).id == "0"
    assert len(given) <= 300


def test_progress_is_shown_on_demand(ask, capsys):
    shown = io.StringIO()
    with Progress("rows", unit="rows", seconds=0, stream=shown) as progress:
        ask(lambda client: client.annotate(TRIPLETS, batch_size=3, progress=progress))
    assert "annotate: 10 of 10 rows" in shown.getvalue()
    assert capsys.readouterr().err == ""
    ask(lambda client: client.annotate(TRIPLETS, progress=True))
    assert "annotate: 10 of 10 rows" in capsys.readouterr().err


def test_score_gives_raw_scores(ask):
    annotation = labels_of(TRIPLETS[:1])[0]
    items = [ScoreItem(prompt=TRIPLETS[0].prompt, response=TRIPLETS[0].response_a)]
    answer = ask(lambda client: client.score(items))
    assert [item.score for item in answer.scores] == [annotation.score_a]


RANKED = [
    RankItem(prompt=f"question {n}", responses=[f"answer {k}" for k in range(2 + n % 3)])
    for n in range(7)
]


def test_embeddings_come_in_order_in_one_answer_or_one_by_one(use, tiny_annotator):
    def load():
        return Annotator.load(tiny_annotator, dtype="float32")

    with serving(load) as service:
        answer = use(service.url, lambda client: client.embed(TRIPLETS, batch_size=4))
        streamed = use(service.url, lambda client: every(client.embed_iter(TRIPLETS, batch_size=4)))
    assert streamed == answer.embeddings
    assert [each.id for each in answer.embeddings] == [str(n) for n in range(10)]
    assert len({tuple(each.embedding) for each in answer.embeddings}) == 10


def test_scores_and_rankings_are_streamed_as_they_are_answered_at_once(ask, monkeypatch):
    monkeypatch.setattr("cwpo.resources.annotations.STREAMED_ROWS", 3)
    items = [{"prompt": f"question {n % 3}", "response": "so " * n} for n in range(1, 9)]
    bad = {"prompt": "no response"}
    scores = ask(lambda client: client.score([*items, bad])).scores
    how = {"batch_size": 2, "concurrency": 2}
    streamed = ask(lambda client: every(client.score_iter(iter([*items, bad]), **how)))
    assert streamed == scores
    assert [label.error.code for label in streamed if hasattr(label, "error")] == ["invalid_row"]
    rankings = ask(lambda client: client.rank(RANKED)).rankings
    streamed = ask(lambda client: every(client.rank_iter(iter(RANKED), batch_size=4)))
    assert streamed == rankings == Annotator.null().rank(RANKED)
    with pytest.raises(CwpoError, match="nothing to send to /rank"):
        ask(lambda client: every(client.rank_iter([])))


def test_rank_is_the_annotator_over_http_in_as_many_requests_as_it_takes(ask):
    # 20 responses, and a request may have ten.
    for batch_size in (10, 4, 1):
        answer = ask(lambda client, size=batch_size: client.rank(RANKED, batch_size=size))
        assert answer.rankings == Annotator.null().rank(RANKED)
        assert [item.id for item in answer.rankings] == [str(n) for n in range(7)]
        assert answer.usage.triplets == 7
        assert answer.model.name == "null"
    # 20 are too many for one request, so that its halves are sent.
    assert ask(lambda client: client.rank(RANKED)).rankings == Annotator.null().rank(RANKED)


def test_all_parts_of_a_ranking_are_asked_of_the_revision_that_answered_the_first(use):
    def answered(number, revision):
        ranking = {"id": str(number), "order": [1, 0], "scores": [0, 1], "confidence": [0.5]}
        model = {"name": "m", "revision": revision}
        usage = {"triplets": 1, "tokens": 1}
        return 200, {}, {"rankings": [ranking], "model": model, "usage": usage, "temperature": 2.0}

    hosted = 200, {}, {**MODEL, "revision": "r1", "max_body_bytes": 1000}
    one_at_a_time = {"batch_size": 1, "concurrency": 1}
    with Script(hosted, answered(0, "r1"), answered(1, "r1")) as server:
        answer = use(server.url, lambda client: client.rank(RANKED[:2], **one_at_a_time))
        asked = [headers.get("x-model-revision") for headers, _ in server.requests]
    assert asked == [None, "r1", "r1"]
    assert [each.id for each in answer.rankings] == ["0", "1"]
    assert answer.temperature == 2.0
    with (
        Script(hosted, answered(0, "r1"), answered(1, "r2")) as server,
        pytest.raises(CwpoError, match=r"revision r2 .* where r1"),
    ):
        use(server.url, lambda client: client.rank(RANKED[:2], **one_at_a_time))


def test_requests_are_of_no_more_rows_than_the_service_takes(ask):
    many = [
        triplet.model_copy(update={"prompt": f"{n}?"}) for n in range(30) for triplet in TRIPLETS
    ]
    assert ask(lambda client: client.annotate(many)).annotations == labels_of(many)
    # One request for all that a request may have by default, and the service takes five.
    assert ask(lambda client: client.annotate(TRIPLETS)).annotations == labels_of(TRIPLETS)
    items = [ScoreItem(prompt=each.prompt, response=each.response_a) for each in TRIPLETS]
    scores = [label.score_a for label in labels_of(TRIPLETS)]
    for batch_size in (256, 3):
        answer = ask(lambda client, size=batch_size: client.score(items, batch_size=size))
        assert [item.score for item in answer.scores] == scores


def test_requests_are_of_no_more_bytes_than_the_service_takes(use):
    """300 rows of 7 KB, where a request may have 100 KB: fourteen fit in each, and not one more."""
    text = "öl\n" * 1400
    triplets = [
        Triplet(prompt=f"question {n} {text}", response_a=f"answer {n}", response_b=f"reply {n}")
        for n in range(300)
    ]
    service = UnsteadyService()
    service.max_body_bytes = 100_000
    answer = use(service.url, lambda client: client.annotate(triplets, priority="batch"))
    service.stop()
    assert answer.annotations == labels_of(triplets)
    assert sorted(map(len, service.prompts)) == [6, *[14] * 21]


def test_what_is_refused_as_too_large_is_sent_in_halves(use):
    """A limit that GET /model does not tell, as that of a proxy."""
    triplets = [
        Triplet(prompt=f"question {n}", response_a="x" * 1000 * (n == 3) + "a", response_b="b")
        for n in range(8)
    ]
    service = UnsteadyService()
    service.max_body_bytes = 400
    answer = use(service.url, lambda client: client.annotate(triplets, priority="batch"))
    with pytest.raises(TooLargeError, match="over 400 bytes"):
        use(service.url, lambda client: client.annotate(triplets[3:4], priority="batch"))
    service.stop()
    expected = labels_of(triplets)
    assert [label.id for label in answer.annotations] == [str(n) for n in range(8)]
    for n, label in enumerate(answer.annotations):
        if n != 3:
            assert label == expected[n]
    assert (answer.annotations[3].error.code, answer.usage.triplets) == ("too_large", 7)
    assert answer.annotations[3].error.detail == "over 400 bytes"


def test_several_requests_are_sent_at_the_same_time(use):
    """The answers of three requests come when all three have arrived."""
    arrived = threading.Barrier(3, timeout=60)

    def answered():
        arrived.wait()
        label = {"id": "0", "preferred": "a", "confidence": 0.5, "score_a": 1, "score_b": 0}
        model, usage = {"name": "m", "revision": "1"}, {"triplets": 1, "tokens": 1}
        return 200, {}, {"annotations": [label], "model": model, "usage": usage}

    hosted = 200, {}, {**MODEL, "max_triplets": 1, "max_body_bytes": 1000}
    with Script(hosted, *[answered] * 6) as server:
        answer = use(
            server.url, lambda client: client.annotate(TRIPLETS[:6], batch_size=1, concurrency=3)
        )
    assert len(answer.annotations) == 6


def test_an_answer_about_other_rows_is_an_error(use):
    model, usage = {"name": "m", "revision": "1"}, {"triplets": 1, "tokens": 1}
    none = {"annotations": [], "model": model, "usage": usage}
    with Script((200, {}, none)) as server, pytest.raises(CwpoError, match="2 rows with 0 labels"):
        use(server.url, lambda client: client.annotate(TRIPLETS[:2]))


def test_model_tells_the_limits(ask):
    assert ask(lambda client: client.model()).max_triplets == 5


def test_a_refusal_is_an_error_of_its_kind_with_the_reason(ask):
    with pytest.raises(InvalidRequestError, match="limit: ") as error:
        ask(lambda client: client.jobs.list(limit=0))
    assert error.value.status == 422
    assert error.value.request_id
    with pytest.raises(UnauthorizedError, match="API key"):
        ask(lambda client: client.model(), api_key="wrong")
    with pytest.raises(NotFoundError, match="job_x"):
        ask(lambda client: client.jobs.get("job_x"))
    with pytest.raises(NotFoundError, match="file_x"):
        ask(lambda client: client.files.get("file_x"))
    with pytest.raises(NotFoundError, match="file_x"):
        ask(lambda client: client.jobs.create("file_x"))


@pytest.fixture
def triplets_file(tmp_path):
    path = tmp_path / "triplets.jsonl"
    rows = [*TRIPLETS, TRIPLETS[0].model_copy(update={"response_a": ""})]
    path.write_text("".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_a_job_from_upload_to_download(ask, house, triplets_file, tmp_path):
    file = ask(lambda client: client.files.upload(triplets_file))
    assert ask(lambda client: client.files.get(file.id)) == file
    job = ask(lambda client: client.jobs.create(file.id))
    assert ask(lambda client: client.jobs.get(job.id)).state == "validating"
    assert ask(lambda client: client.jobs.list(limit=1)).jobs[0].id == job.id
    with pytest.raises(ConflictError, match="no results"):
        ask(lambda client: client.jobs.download(job.id, tmp_path / "early", format="jsonl"))
    assert not (tmp_path / "early").exists()
    house.work()
    done = ask(lambda client: client.jobs.wait(job.id))
    assert done.state == "completed_with_errors"
    assert (done.progress.rows_annotated, done.progress.rows_failed) == (10, 1)
    parquet, jsonl, errors = (tmp_path / name for name in ("w.parquet", "w.jsonl", "e.jsonl"))
    ask(lambda client: client.jobs.download(job.id, parquet, format="parquet"))
    ask(lambda client: client.jobs.download(job.id, jsonl, format="jsonl"))
    ask(lambda client: client.jobs.download_errors(job.id, errors))
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert pq.read_table(parquet).to_pylist() == rows
    assert [row["prompt"] for row in rows] == [triplet.prompt for triplet in TRIPLETS]
    assert json.loads(errors.read_text())["code"] == "empty_response"
    assert ask(lambda client: client.jobs.delete(job.id)) == done
    assert ask(lambda client: client.files.delete(file.id)) == file
    for gone in (lambda client: client.jobs.get(job.id), lambda client: client.files.get(file.id)):
        with pytest.raises(NotFoundError):
            ask(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "e.jsonl",
        "triplets.jsonl",
        "w.jsonl",
        "w.parquet",
    ]


def test_jobs_are_listed_by_when_they_were_created(ask, triplets_file):
    file = ask(lambda client: client.files.upload(triplets_file))
    job = ask(lambda client: client.jobs.create(file.id))
    later = ask(lambda client: client.jobs.list(created_after=job.created_at)).jobs
    assert [found.id for found in later] == [job.id]
    naive = job.created_at.astimezone().replace(tzinfo=None)
    assert job not in ask(lambda client: client.jobs.list(created_before=naive)).jobs
    ask(lambda client: client.jobs.cancel(job.id))


def test_jobs_are_listed_page_by_page_until_there_are_no_more(ask, triplets_file, monkeypatch):
    file = ask(lambda client: client.files.upload(triplets_file))
    jobs = [ask(lambda client: client.jobs.create(file.id)) for _ in range(5)]
    first = jobs[0].created_at
    ask(lambda client: client.jobs.cancel(jobs[2].id))
    newest_first = [job.id for job in reversed(jobs)]
    for size in (2, 5, 100):
        monkeypatch.setattr("cwpo.resources.jobs.JOBS_A_PAGE", size)
        listed = ask(lambda client: every(client.jobs.list_iter(created_after=first)))
        assert [job.id for job in listed] == newest_first
    monkeypatch.setattr("cwpo.resources.jobs.JOBS_A_PAGE", 1)
    which = {"created_after": first, "state": "cancelled"}
    cancelled = ask(lambda client: every(client.jobs.list_iter(**which)))
    assert [job.id for job in cancelled] == [jobs[2].id]
    page = ask(lambda client: client.jobs.list(created_after=first, limit=2))
    rest = ask(lambda client: client.jobs.list(created_after=first, cursor=page.next_cursor))
    assert [job.id for job in (*page.jobs, *rest.jobs)] == newest_first
    assert rest.next_cursor is None
    for job in jobs:
        if job is not jobs[2]:
            ask(lambda client, job=job: client.jobs.cancel(job.id))


def test_what_a_job_that_has_not_ended_needs_is_not_deleted(ask, triplets_file):
    file = ask(lambda client: client.files.upload(triplets_file))
    job = ask(lambda client: client.jobs.create(file.id))
    for needed in (
        lambda client: client.files.delete(file.id),
        lambda client: client.jobs.delete(job.id),
    ):
        with pytest.raises(ConflictError, match=job.id):
            ask(needed)
    ask(lambda client: client.jobs.cancel(job.id))


def test_an_input_on_the_service_s_side_is_for_its_operator_to_allow(ask):
    with pytest.raises(UnauthorizedError, match="--input-prefix"):
        ask(lambda client: client.jobs.create(input="rows.jsonl"))
    with pytest.raises(CwpoError, match="either file_id, the id of an upload, or input"):
        ask(lambda client: client.jobs.create())


def test_waiting_for_a_cancelled_job_is_an_error(ask, triplets_file):
    file = ask(lambda client: client.files.upload(triplets_file))
    job = ask(lambda client: client.jobs.create(file.id))
    assert ask(lambda client: client.jobs.cancel(job.id)).state == "cancelled"
    with pytest.raises(JobFailedError, match="cancelled"):
        ask(lambda client: client.jobs.wait(job.id))
    assert ask(lambda client: client.jobs.resume(job.id)).state == "validating"


MODEL = {
    "name": "m",
    "revision": "1",
    "backend": "null",
    "device": "cpu",
    "dtype": "float32",
    "max_length": 1,
    "max_triplets": 1,
    "max_body_bytes": 1,
}
FILE = {
    "id": "file_1",
    "format": "jsonl",
    "bytes": 1,
    "sha256": "0",
    "created_at": "2026-01-01T00:00:00Z",
}
BUSY = {"title": "Too Many Requests", "status": 429, "detail": "come back"}
TOO_LARGE = {"title": "Content Too Large", "status": 413, "detail": "too many"}


class Script:
    """A server that gives the answers of a list, one a request, and notes what it was sent.

    Each is a status, headers and a body, or a function that gives these at the request. A status
    None closes the connection.
    """

    def __init__(self, *answers):
        script = self
        self.answers = list(answers)
        self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                headers = {name.lower(): value for name, value in self.headers.items()}
                script.requests.append((headers, self.body()))
                answer = script.answers.pop(0)
                status, headers, body = answer() if callable(answer) else answer
                if status is None:
                    self.close_connection = True
                    return
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(content)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def body(self):
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length") or 0))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        serve = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)
        serve.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def test_a_busy_service_is_asked_again_when_it_says_and_not_before(use):
    free_at = []

    def busy():
        free_at.append(time.monotonic() + 0.2)
        return 429, {"Retry-After": 0.2}, BUSY

    def free_by_then():
        is_free = time.monotonic() >= free_at[0]
        return (200, {}, MODEL) if is_free else (503, {}, BUSY)

    with Script(busy, free_by_then) as server:
        assert use(server.url, lambda client: client.model(), max_retries=1).name == "m"


def events_of(use, url, **options):
    """The states that `client.jobs.events` tells, and the error that ends them, if one does."""
    told = []

    def follow(client):
        events = client.jobs.events("job-1")
        if not hasattr(events, "__aiter__"):
            return told.extend(job.state for job in events)

        async def collect():
            async for job in events:
                told.append(job.state)

        return collect()

    try:
        use(url, follow, **options)
    except CwpoError as error:
        return told, error
    return told, None


def event(event_id, state):
    job = {"id": "job-1", "state": state, "created_at": "2026-01-01T00:00:00Z"}
    return f"id: {event_id}\nevent: job\ndata: {json.dumps(job)}\n\n"


def test_events_that_break_off_go_on_behind_the_last_one(use):
    def stream(*text):
        return 200, {"Content-Type": "text/event-stream"}, "".join(text).encode()

    cut = event("4.9", "running").rstrip("\n")
    with Script(
        stream(event("1.0", "validating"), ": still here\n\n", event("2.0", "queued"), cut),
        (503, {"Retry-After": 0}, BUSY),
        (None, {}, None),
        stream(event("3.5", "running")),
        stream(event("5.9", "completed")),
    ) as server:
        states = ["validating", "queued", "running", "completed"]
        assert events_of(use, server.url) == (states, None)
        seen = [headers.get("last-event-id") for headers, _ in server.requests]
    assert seen == [None, "2.0", "2.0", "2.0", "3.5"]


def test_events_end_where_there_is_nothing_more_to_come_or_to_hope_for(use):
    with Script((204, {}, b"")) as server:
        assert events_of(use, server.url) == ([], None)
    with Script((404, {}, {"title": "Not Found", "status": 404, "detail": "no job"})) as server:
        assert isinstance(events_of(use, server.url)[1], NotFoundError)
    with Script(*[(200, {}, b"")] * 3) as server:
        told, error = events_of(use, server.url, max_retries=2)
        assert (told, type(error)) == ([], ConnectionFailedError)


def test_an_older_service_is_sent_no_field_that_was_not_asked_for(use):
    job = {"id": "job-1", "state": "validating", "created_at": "2026-01-01T00:00:00Z"}
    with Script((201, {}, job), (201, {}, job)) as server:
        use(server.url, lambda client: client.jobs.create("file-1"))
        use(server.url, lambda client: client.jobs.create("file-1", truncation="prompt_left"))
        bodies = [json.loads(body) for _, body in server.requests]
    assert bodies == [{"file_id": "file-1"}, {"file_id": "file-1", "truncation": "prompt_left"}]


def test_a_lost_connection_is_tried_again(use):
    with Script((None, {}, b""), (200, {}, MODEL)) as server:
        assert use(server.url, lambda client: client.model()).name == "m"


def test_a_service_that_stays_busy_is_an_error_at_last(use):
    with Script(*[(429, {"Retry-After": 0}, BUSY)] * 3) as server:
        with pytest.raises(OverloadedError, match="come back"):
            use(server.url, lambda client: client.model(), max_retries=2)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 501])
def test_what_time_does_not_mend_is_not_tried_again(use, status):
    with Script((status, {}, {**BUSY, "status": status})) as server:
        with pytest.raises(APIError):
            use(server.url, lambda client: client.model())
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (401, "unauthorized", UnauthorizedError),
        (404, "unknown", NotFoundError),
        (409, "conflict", ConflictError),
        (413, "too_large", TooLargeError),
        (422, "invalid", InvalidRequestError),
        (429, "overloaded", OverloadedError),
        (500, "backend", ServiceFailedError),
        (503, "draining", OverloadedError),
        (507, "storage", ServiceFailedError),
        (418, "teapot", APIError),
    ],
)
def test_an_error_carries_the_problem(use, status, reason, kind):
    problem = {"title": "No", "status": status, "detail": "for a reason", "reason": reason}
    headers = {"X-Request-ID": "r-1", "Retry-After": 3}
    with Script((status, headers, problem)) as server, pytest.raises(APIError) as caught:
        use(server.url, lambda client: client.model(), max_retries=0)
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.reason, error.request_id) == (status, reason, "r-1")
    assert (error.retry_after, error.problem.detail) == (3.0, "for a reason")


def test_a_failure_of_the_service_is_tried_again(use):
    failed = 500, {"Retry-After": 0}, {**BUSY, "status": 500}
    with Script(failed, (408, {}, {**BUSY, "status": 408}), (200, {}, MODEL)) as server:
        assert use(server.url, lambda client: client.model()).name == "m"


def test_a_call_may_have_a_timeout_and_retries_of_its_own(use):
    answered = threading.Event()

    def late():
        answered.wait(60)
        return 200, {}, MODEL

    def in_time(client):
        return client.with_options(timeout=0.2, max_retries=0).model()

    with Script(late, (200, {}, MODEL)) as server:
        with pytest.raises(NoAnswerInTimeError, match=r"within 0\.2 s: send less"):
            use(server.url, in_time)
        answered.set()
        assert len(server.requests) == 1
        # The client that it was made of keeps its own.
        assert use(
            server.url, lambda client: (client.with_options(timeout=0.001), client)[1].model()
        )


def test_all_tries_of_an_upload_have_one_key_and_the_whole_body(use, triplets_file):
    busy = (503, {"Retry-After": 0}, BUSY)
    with Script(busy, busy, (201, {}, FILE)) as server:
        assert use(server.url, lambda client: client.files.upload(triplets_file)).id == "file_1"
    keys = {headers["idempotency-key"] for headers, _ in server.requests}
    assert len(keys) == 1
    assert {body for _, body in server.requests} == {triplets_file.read_bytes()}
    digest = b64encode(sha256(triplets_file.read_bytes()).digest()).decode()
    assert {headers["content-digest"] for headers, _ in server.requests} == {f"sha-256=:{digest}:"}


def test_upload_and_download_show_how_far_they_are(use, triplets_file, tmp_path):
    shown = io.StringIO()
    with (
        Script((201, {}, FILE), (200, {}, b"x" * 5000)) as server,
        Progress("file", unit="bytes", seconds=0, stream=shown) as progress,
    ):
        use(server.url, lambda client: client.files.upload(triplets_file, progress=progress))
        use(
            server.url,
            lambda client: client.jobs.download(
                "job-1", tmp_path / "out", format="jsonl", progress=progress
            ),
        )
    size = f"{triplets_file.stat().st_size:,}"
    for told in (
        f"checksum: {size} of {size} bytes",
        f"upload: {size} of {size}",
        "5,000 of 5,000",
    ):
        assert told in shown.getvalue()


def test_nobody_there_is_one_line_that_says_what_to_do(use):
    with pytest.raises(ConnectionFailedError, match="cwpo up"):
        use("http://127.0.0.1:9", lambda client: client.model(), max_retries=1)


def test_an_answer_of_something_else_is_said_to_be_that(use):
    told = pytest.raises(CwpoError, match=r"is 127\.0\.0\.1:.* a cwpo service")
    with Script((200, {}, {"hello": "world"})) as server, told:
        use(server.url, lambda client: client.model())


def test_an_error_page_that_is_no_problem_is_still_an_error(use):
    with (
        Script((404, {}, b"<html>nginx</html>")) as server,
        pytest.raises(NotFoundError),
    ):
        use(server.url, lambda client: client.model())
