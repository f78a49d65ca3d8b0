"""Reviews over HTTP: several people, undo, agreement, owners."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import httpx2
import pytest
import redis

from cwpo.reviews.agreement import merged
from cwpo.reviews.forms import read_answers
from cwpo_annotator import Annotator
from cwpo_worker.errors import UnknownReviewError
from cwpo_worker.reviews.reviews import Reviews
from harness import TIMEOUT

KEYS = {"alice": "wonderland", "bob": "builder", "cwpo-worker": "ant"}


@pytest.fixture(scope="module")
def office(furnish, tmp_path_factory):
    """A service that takes jobs, where alice and bob have keys."""
    folder = tmp_path_factory.mktemp("office")
    keys = folder / "keys"
    lines = [f"{name}:{sha256(key.encode()).hexdigest()}\n" for name, key in KEYS.items()]
    keys.write_text("".join(lines))
    with furnish(folder, api_key=KEYS["cwpo-worker"], api_keys_file=keys) as office:
        yield office


@pytest.fixture(scope="module")
def alice(office):
    headers = {"X-API-Key": KEYS["alice"]}
    with httpx2.Client(base_url=office.url, headers=headers, timeout=TIMEOUT) as http:
        yield http


@pytest.fixture(scope="module")
def job(office):
    """A job of alice's, done."""
    job_id = office.submit(office.rows(120), owner="alice")
    office.work()
    return job_id


def start(http, job, **options):
    asked = {"job_id": job, "below": 0.5, "most": 12, **options}
    answer = http.post("/reviews", json=asked)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def turn(http, review, what, reviewer, **body):
    answer = http.post(f"/reviews/{review}/{what}", json={"reviewer": reviewer, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def answer_all(http, review, reviewer, preferred="a"):
    """The numbers of the rows that this person gets until nothing is left."""
    numbers = []
    row = turn(http, review, "next", reviewer)["row"]
    while row is not None:
        numbers.append(row["number"])
        said = {"number": row["number"], "preferred": preferred}
        row = turn(http, review, "answers", reviewer, **said)["row"]
    return numbers


def test_the_rows_are_uncertain_ones_of_the_job(office, alice, job, tmp_path):
    review = start(alice, job, most=2000)
    answer_all(alice, review, "Ada")
    path = tmp_path / "answers.jsonl"
    path.write_bytes(alice.get(f"/reviews/{review}/answers").content)
    of_id = {row["id"]: row for row in office.results(job)}
    answers = read_answers(path)
    uncertain = {row_id for row_id, row in of_id.items() if row["confidence"] < 0.5}
    assert {answer.id for answer in answers} == uncertain
    for answer in answers:
        number = answer.id.removeprefix("row-")
        assert (answer.response_a, answer.response_b) == (f"yes {number}", f"no {number} 😀")
        assert answer.annotator == of_id[answer.id]["preferred"]
        assert answer.confidence == pytest.approx(of_id[answer.id]["confidence"])
        assert (answer.reviewer, answer.preferred) == ("Ada", "a")
    _, report = merged(answers)
    expected = sum(of_id[row]["preferred"] == "a" for row in uncertain) / len(uncertain)
    assert report.with_annotator.share == pytest.approx(expected)


def test_rows_are_drawn_at_random_where_the_annotator_has_no_embeddings(alice, job):
    assert alice.get(f"/reviews/{start(alice, job)}").json()["spread"] is False


def test_rows_are_spread_by_the_embeddings_of_the_annotator(furnish, tiny_annotator, tmp_path):
    """Of many that are equal, only one comes before all that are not."""

    def load():
        return Annotator.load(tiny_annotator, dtype="float32")

    def row(number, answer):
        return {"prompt": "q", "response_a": answer, "response_b": "no", "id": f"row-{number}"}

    others = ["why not", "a cat sat", "1 2 3 4 5 6", "yes yes yes"]
    rows = [row(n, "maybe") for n in range(20)] + [row(20 + n, o) for n, o in enumerate(others)]
    with furnish(tmp_path, load) as house, httpx2.Client(base_url=house.url, timeout=TIMEOUT) as me:
        job_id = house.submit(rows, owner=None)
        house.work()
        review = start(me, job_id, below=1, most=5)
        assert me.get(f"/reviews/{review}").json()["spread"] is True
        answer_all(me, review, "Ada")
        answers = me.get(f"/reviews/{review}/answers").text.splitlines()
    assert {json.loads(line)["response_a"] for line in answers} == {"maybe", *others}


def test_a_row_does_not_tell_what_the_annotator_says(alice, job):
    row = turn(alice, start(alice, job), "next", "Ada")["row"]
    assert set(row) == {"number", "prompt", "response_a", "response_b"}


def test_several_people_at_once_get_different_rows(alice, job):
    review = start(alice, job)
    names = ["Ada", "Bob", "Cy"]
    with ThreadPoolExecutor(3) as pool:
        numbers = [*pool.map(lambda name: answer_all(alice, review, name), names)]
    assert sorted(number for of_one in numbers for number in of_one) == list(range(12))
    progress = alice.get(f"/reviews/{review}").json()["progress"]
    assert (progress["rows"], progress["rows_done"], progress["answers"]) == (12, 12, 12)
    assert sum(progress["reviewers"].values()) == 12


def test_a_row_that_is_held_comes_again_to_its_holder_alone(alice, job):
    review = start(alice, job)
    first = turn(alice, review, "next", "Ada")["row"]
    assert turn(alice, review, "next", "Ada")["row"] == first
    assert turn(alice, review, "next", "Bob")["row"] != first


def test_every_row_gets_as_many_answers_as_are_wanted_by_different_people(alice, job):
    review = start(alice, job, most=6, answers_per_row=2)
    with ThreadPoolExecutor(3) as pool:
        counts = pool.map(lambda name: len(answer_all(alice, review, name)), ["A", "B", "C"])
    assert sum(counts) >= 11
    for name in "ABC":
        answer_all(alice, review, name)
    answers = [
        json.loads(line) for line in alice.get(f"/reviews/{review}/answers").text.splitlines()
    ]
    assert alice.get(f"/reviews/{review}").json()["progress"]["rows_done"] == 6
    assert len({(each["id"], each["reviewer"]) for each in answers}) == len(answers) == 12


def test_a_row_that_is_answered_while_a_person_takes_it_is_not_handed_out_again(office, alice, job):
    """By a replica whose request to Redis is late."""
    review = start(alice, job, most=3)

    class Late(redis.Redis):
        """Sets a free place only after somebody else has taken it, answered, and left it."""

        is_late = True

        def set(self, *arguments, **options):
            if options.get("nx") and self.is_late:
                self.is_late = False
                row = turn(alice, review, "next", "Ada")["row"]
                turn(alice, review, "answers", "Ada", number=row["number"], preferred="a")
            return super().set(*arguments, **options)

    with Late.from_url(office.valkey.url) as late:
        replica = Reviews(late, office.store, office.ledger)
        # Ada has answered row 0, and been handed row 1.
        assert replica.next(review, "Bob", owner="alice").row.number == 2
    progress = alice.get(f"/reviews/{review}").json()["progress"]
    assert progress["reviewers"] == {"Ada": 1}
    assert progress["rows_done"] == 1


def test_undo_takes_back_the_last_answer_and_keeps_it_in_the_store(office, alice, job):
    review = start(alice, job)
    numbers = []
    row = turn(alice, review, "next", "Ada")["row"]
    for preferred in ("a", "b"):
        numbers.append(row["number"])
        said = {"number": row["number"], "preferred": preferred}
        row = turn(alice, review, "answers", "Ada", **said)["row"]
    step = turn(alice, review, "undo", "Ada")
    assert step["row"]["number"] == numbers[1]
    assert step["progress"]["answers"] == 1
    step = turn(alice, review, "answers", "Ada", number=numbers[1], preferred="tie")
    assert step["progress"]["answers"] == 2
    (first, second) = map(json.loads, alice.get(f"/reviews/{review}/answers").text.splitlines())
    assert {first["preferred"], second["preferred"]} == {"a", "tie"}
    assert len(office.store.list(f"reviews/{review}/answers")) == 4
    turn(alice, review, "undo", "Ada")
    turn(alice, review, "undo", "Ada")
    answer = alice.post(f"/reviews/{review}/undo", json={"reviewer": "Ada"})
    assert answer.status_code == 409


def test_answers_outlive_redis_and_the_process(office, alice, job):
    review = start(alice, job)
    said = answer_all(alice, review, "Ada")
    office.redis.delete(*office.redis.keys("cwpo:review:*") or ["none"])
    again = Reviews(office.redis, office.store, office.ledger)
    assert len(again.answers(review, owner="alice")) == len(said)
    assert again.next(review, "Bob", owner="alice").row is None


def test_who_and_when_and_by_which_key_is_kept(office, alice, job):
    review = start(alice, job)
    row = turn(alice, review, "next", " Ada ")["row"]
    turn(alice, review, "answers", " Ada ", number=row["number"], preferred="b")
    (key,) = office.store.list(f"reviews/{review}/answers")
    kept = json.loads(office.store.read(key))
    assert (kept["reviewer"], kept["key"], kept["preferred"]) == ("Ada", "alice", "b")
    assert kept["at"].endswith("Z")


def test_a_deleted_review_is_gone_from_the_store_and_from_every_replica(
    office, alice, job, problem
):
    review, other = start(alice, job), start(alice, job)
    row = turn(alice, review, "next", "Ada")["row"]
    turn(alice, review, "answers", "Ada", number=row["number"], preferred="a")
    replica = Reviews(office.redis, office.store, office.ledger)
    assert replica.get(review, owner="alice").progress.answers == 1
    assert replica.get(other, owner="alice").progress.answers == 0
    before = alice.get(f"/reviews/{review}").json()
    answer = alice.delete(f"/reviews/{review}")
    assert answer.status_code == 200
    assert answer.json() == before
    assert office.store.list(f"reviews/{review}") == []
    assert problem(alice.get(f"/reviews/{review}"))["status"] == 404
    assert problem(alice.delete(f"/reviews/{review}"))["status"] == 404
    assert review not in [each["id"] for each in alice.get("/reviews").json()["reviews"]]
    # One that nobody has answered, too.
    assert alice.delete(f"/reviews/{other}").status_code == 200
    for gone in (review, other):
        with pytest.raises(UnknownReviewError):
            replica.get(gone, owner="alice")
    assert alice.get(f"/jobs/{job}").status_code == 200


def test_others_do_not_see_a_review(office, alice, job, problem):
    review = start(alice, job)
    headers = {"X-API-Key": KEYS["bob"]}
    with httpx2.Client(base_url=office.url, headers=headers, timeout=TIMEOUT) as bob:
        assert bob.get("/reviews").json() == {"reviews": []}
        assert problem(bob.get(f"/reviews/{review}"))["status"] == 404
        assert problem(bob.post("/reviews", json={"job_id": job}))["status"] == 404
    assert review in [each["id"] for each in alice.get("/reviews").json()["reviews"]]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/reviews", {"job_id": "job-0"}, 404),
        ("/reviews", {"job_id": "JOB", "below": 1e-9}, 409),
        ("/reviews", {"job_id": "JOB", "below": 2}, 422),
        ("/reviews/REVIEW/next", {"reviewer": "  "}, 422),
        ("/reviews/REVIEW/answers", {"reviewer": "A", "number": 99, "preferred": "a"}, 404),
        ("/reviews/REVIEW/answers", {"reviewer": "A", "number": 0, "preferred": "c"}, 422),
        (f"/reviews/review-{'0' * 24}/next", {"reviewer": "A"}, 404),
        ("/reviews/..%2Fjobs/next", {"reviewer": "A"}, 404),
    ],
)
def test_what_cannot_be_is_refused(alice, job, problem, path, body, status):
    review = start(alice, job)
    if body.get("job_id") == "JOB":
        body = {**body, "job_id": job}
    assert problem(alice.post(path.replace("REVIEW", review), json=body))["status"] == status
