"""All reviews: their rows and answers in the store, and who looks at which row in Redis.

A review is a record and its rows, which never change, and a blob for each answer and each undone
one: nothing that a person said is ever replaced, until the review is deleted as a whole. Who holds
a row is forgotten after HELD_SECONDS, and if Redis is lost, at worst two people answer one row.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.compute as pc
import redis
from pydantic import BaseModel, TypeAdapter

from cwpo.reviews.pairs import ReviewAnswer, ReviewPair
from cwpo.reviews.selection import pool_size, sampled, spread
from cwpo.types import Preference
from cwpo_worker import ids
from cwpo_worker.errors import (
    BlobNotFoundError,
    NothingToUndoError,
    NoUncertainRowError,
    UnknownReviewError,
)
from cwpo_worker.jobs.dataset import Dataset
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.record import now
from cwpo_worker.queue.connection import queue_errors
from cwpo_worker.reviews.review import (
    Review,
    ReviewProgress,
    ReviewRequest,
    ReviewRow,
    ReviewStep,
)
from cwpo_worker.storage.store import BlobStore

if TYPE_CHECKING:
    from cwpo.reviews.selection import Embeddings

HELD_SECONDS = 600
# Of a larger dataset, parts that are spread evenly over it.
_PARTS_READ = 200
_OPEN_REVIEWS = 32
_LISTED = 50
_ROWS = TypeAdapter(list[ReviewPair])


class ReviewRecord(BaseModel):
    """The record of a review. owner: name of the API key that made it; None without keys."""

    id: str
    owner: str | None
    job_id: str
    below: float
    most: int
    answers_per_row: int
    rows: int
    # Reviews of earlier versions were spread by words.
    spread: bool = True
    created_at: datetime


class AnswerRecord(BaseModel):
    """An answer, or one that is withdrawn.

    key: name of the API key that sent it; None without keys.
    preferred: None of one that withdraws what this person said of the row before.
    """

    number: int
    reviewer: str
    key: str | None
    preferred: Preference | None
    at: datetime


class Reviews:
    """The reviews of a store.

    An owner is the name of an API key and sees its own reviews; owner None sees everybody's. Calls
    that read or hand out rows raise QueueUnavailableError when Redis cannot be used.
    """

    def __init__(self, redis: redis.Redis, store: BlobStore, ledger: Ledger) -> None:
        self._redis = redis
        self._store = store
        self._ledger = ledger
        self._open: OrderedDict[str, _OpenReview] = OrderedDict()
        self._lock = Lock()

    def uncertain(self, request: ReviewRequest, *, owner: str | None) -> list[ReviewPair]:
        """Uncertain rows of a job's dataset, more than are wanted, to select from.

        Raises: as Ledger.dataset does; NoUncertainRowError.
        """
        dataset = self._ledger.dataset(request.job_id, owner=owner)
        rows = sampled(_uncertain(dataset, request.below), pool_size(request.most))
        if not rows:
            raise NoUncertainRowError(
                f"no row of job {request.job_id} has a confidence below {request.below:g}"
            )
        return rows

    def create(
        self,
        request: ReviewRequest,
        uncertain: Sequence[ReviewPair],
        embeddings: Embeddings | None,
        *,
        owner: str | None,
    ) -> Review:
        """Begin a review of some of the uncertain rows.

        Args:
            embeddings: of these rows, which are spread by them; None draws at random.
        """
        if embeddings is None:
            rows = sampled(uncertain, request.most)
        else:
            rows = spread(uncertain, embeddings, request.most)
        record = ReviewRecord(
            id=ids.make("review", owner, None),
            owner=owner,
            rows=len(rows),
            spread=embeddings is not None,
            created_at=now(),
            **request.model_dump(),
        )
        folder = _Folder(record.id)
        with self._store.create(folder.rows) as blob:
            blob.write(_ROWS.dump_json(rows))
        # The record is last: with it, there is a review.
        with self._store.create(folder.record) as blob:
            blob.write(record.model_dump_json().encode())
        return self._opened(record.id, owner).public()

    def newest(self, *, owner: str | None) -> list[Review]:
        """The newest fifty reviews."""
        records = []
        for folder in self._store.list("reviews"):
            record = self._record(folder.rsplit("/", 1)[-1])
            if record is not None and owner in (None, record.owner):
                records.append(record)
        records.sort(key=lambda record: record.created_at, reverse=True)
        return [self._opened(record.id, owner).public() for record in records[:_LISTED]]

    def get(self, review_id: str, *, owner: str | None) -> Review:
        """The review as it stands. Raises: UnknownReviewError."""
        return self._opened(review_id, owner).public()

    def delete(self, review_id: str, *, owner: str | None) -> Review:
        """Remove a review with its rows and all answers, and return what it was.

        Raises: UnknownReviewError.
        """
        review = self._opened(review_id, owner).public()
        folder = _Folder(review_id)
        # The record first: without it, there is no review, whatever is still there of it.
        self._store.delete(folder.record)
        self._store.delete_folder(folder.all)
        self._forget(review_id)
        return review

    def next(self, review_id: str, reviewer: str, *, owner: str | None) -> ReviewStep:
        """A row for this person, the same one until it is answered; nobody else gets it meanwhile.

        Raises: UnknownReviewError.
        """
        review = self._opened(review_id, owner)
        return self._step(review, reviewer)

    def answer(
        self,
        review_id: str,
        reviewer: str,
        number: int,
        preferred: Preference,
        *,
        owner: str | None,
        key: str | None,
    ) -> ReviewStep:
        """Keep an answer, and hand out the next row.

        Args:
            key: name of the API key that sends it.
        Raises: UnknownReviewError, also for a row that the review does not have.
        """
        review = self._opened(review_id, owner)
        if number >= review.record.rows:
            raise UnknownReviewError(f"review {review_id} has no row {number}")
        review.add(
            AnswerRecord(number=number, reviewer=reviewer, key=key, preferred=preferred, at=now())
        )
        with queue_errors():
            self._release(review, number, reviewer)
        return self._step(review, reviewer)

    def undo(
        self, review_id: str, reviewer: str, *, owner: str | None, key: str | None
    ) -> ReviewStep:
        """Withdraw the last answer of this person, who gets its row again.

        Raises: UnknownReviewError; NothingToUndoError.
        """
        review = self._opened(review_id, owner)
        last = review.last_of(reviewer)
        if last is None:
            raise NothingToUndoError(f"{reviewer} has given no answer in review {review_id}")
        withdrawn = last.model_copy(update={"preferred": None, "key": key, "at": now()})
        review.add(withdrawn)
        with queue_errors():
            self._redis.set(_holder(review_id, reviewer), last.number, ex=HELD_SECONDS)
        return self._step(review, reviewer)

    def answers(self, review_id: str, *, owner: str | None) -> list[ReviewAnswer]:
        """The answers that stand, by row, with the annotator's labels.

        Raises: UnknownReviewError.
        """
        review = self._opened(review_id, owner)
        return [
            ReviewAnswer(
                **review.rows[found.number].model_dump(),
                preferred=found.preferred,
                reviewer=found.reviewer,
                answered_at=found.at,
            )
            for found in sorted(review.standing(), key=lambda found: (found.number, found.at))
        ]

    def _step(self, review: _OpenReview, reviewer: str) -> ReviewStep:
        with queue_errors():
            number = self._hold(review, reviewer)
        row = None
        if number is not None:
            pair = review.rows[number]
            texts = pair.model_dump(include={"prompt", "response_a", "response_b"})
            row = ReviewRow(number=number, **texts)
        return ReviewStep(row=row, progress=review.progress())

    def _hold(self, review: _OpenReview, reviewer: str) -> int | None:
        """The number of the row that this person holds, or holds from now on."""
        own = _holder(review.record.id, reviewer)
        held = self._redis.get(own)
        if held is not None and reviewer not in review.reviewers_of(int(held)):
            self._take(review, int(held), reviewer)
            return int(held)
        for number in range(review.record.rows):
            given = review.reviewers_of(number)
            if reviewer in given or len(given) >= review.record.answers_per_row:
                continue
            if self._take(review, number, reviewer):
                self._redis.set(own, number, ex=HELD_SECONDS)
                return number
        return None

    def _take(self, review: _OpenReview, number: int, reviewer: str) -> bool:
        """Whether this person holds one of the row's places: as many as it wants answers."""
        places = _places(review.record, number)
        while True:
            holders = [_text(holder) for holder in self._redis.mget(places)]
            if reviewer in holders:
                self._redis.expire(places[holders.index(reviewer)], HELD_SECONDS)
                return True
            taken = review.reviewers_of(number).union(filter(None, holders))
            if len(taken) >= len(places) or None not in holders:
                return False
            free = places[holders.index(None)]
            if self._redis.set(free, reviewer, ex=HELD_SECONDS, nx=True):
                return self._is_wanted(review, number, reviewer, free)

    def _is_wanted(self, review: _OpenReview, number: int, reviewer: str, place: str) -> bool:
        """Whether the row still wants the answer of who has just taken this place; else it is left.

        The place was free when it was looked at, and may have been taken, answered and given back
        before it was taken now.
        """
        review.refresh()
        holders = map(_text, self._redis.mget(_places(review.record, number)))
        others = {holder for holder in holders if holder not in (None, reviewer)}
        if len(review.reviewers_of(number) | others) < review.record.answers_per_row:
            return True
        self._redis.delete(place)
        return False

    def _release(self, review: _OpenReview, number: int, reviewer: str) -> None:
        """Give back the place of a row that is answered."""
        places = _places(review.record, number)
        held = zip(places, self._redis.mget(places), strict=True)
        own = [place for place, holder in held if _text(holder) == reviewer]
        self._redis.delete(_holder(review.record.id, reviewer), *own)

    def _opened(self, review_id: str, owner: str | None) -> _OpenReview:
        """The review with the answers that are there. Raises: UnknownReviewError."""
        with self._lock:
            review = self._open.get(review_id)
        if review is None:
            record = self._record(review_id)
            if record is None:
                raise UnknownReviewError(f"there is no review {review_id[:64]!r}")
            review = _OpenReview(self._store, record)
            with self._lock:
                review = self._open.setdefault(review_id, review)
                if len(self._open) > _OPEN_REVIEWS:
                    self._open.popitem(last=False)
        if owner is not None and review.record.owner != owner:
            raise UnknownReviewError(f"there is no review {review_id[:64]!r}")
        # Another replica may have deleted it since.
        if not review.refresh() and self._record(review_id) is None:
            self._forget(review_id)
            raise UnknownReviewError(f"there is no review {review_id[:64]!r}")
        return review

    def _forget(self, review_id: str) -> None:
        with self._lock:
            self._open.pop(review_id, None)

    def _record(self, review_id: str) -> ReviewRecord | None:
        if not ids.is_valid("review", review_id):
            return None
        try:
            return ReviewRecord.model_validate_json(self._store.read(_Folder(review_id).record))
        except BlobNotFoundError:
            return None


class _Folder(NamedTuple):
    """The keys of a review's blobs."""

    id: str

    @property
    def all(self) -> str:
        return f"reviews/{self.id}"

    @property
    def record(self) -> str:
        return f"reviews/{self.id}/review.json"

    @property
    def rows(self) -> str:
        return f"reviews/{self.id}/rows.json"

    @property
    def answers(self) -> str:
        return f"reviews/{self.id}/answers"

    def new_answer(self, at: datetime) -> str:
        return f"{self.answers}/{at:%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}.json"


class _OpenReview:
    """A review in memory: each blob of an answer is read once, since it never changes."""

    def __init__(self, store: BlobStore, record: ReviewRecord) -> None:
        self.record = record
        self._store = store
        self._folder = _Folder(record.id)
        self._lock = Lock()
        self._read: dict[str, AnswerRecord] = {}
        # The last word of each person on each row.
        self._last: dict[tuple[int, str], AnswerRecord] = {}
        self._reviewers: dict[int, set[str]] = defaultdict(set)

    @cached_property
    def rows(self) -> Sequence[ReviewPair]:
        """The rows, which are read when the first one is needed."""
        return _ROWS.validate_json(self._store.read(self._folder.rows))

    def refresh(self) -> bool:
        """Read what was added, here or by another replica.

        Returns: whether all that was known of is there, and is something: nothing of a review that
        has been deleted is.
        """
        with self._lock:
            keys = self._store.list(self._folder.answers)
            for key in keys:
                if key not in self._read:
                    with suppress(BlobNotFoundError):
                        self._note(key, AnswerRecord.model_validate_json(self._store.read(key)))
            return bool(keys) and self._read.keys() <= set(keys)

    def add(self, answer: AnswerRecord) -> None:
        """Keep an answer."""
        key = self._folder.new_answer(answer.at)
        with self._store.create(key) as blob:
            blob.write(answer.model_dump_json().encode())
        with self._lock:
            self._note(key, answer)

    def _note(self, key: str, answer: AnswerRecord) -> None:
        self._read[key] = answer
        known = self._last.get((answer.number, answer.reviewer))
        if known is None or known.at <= answer.at:
            self._last[answer.number, answer.reviewer] = answer
            change = set.discard if answer.preferred is None else set.add
            change(self._reviewers[answer.number], answer.reviewer)

    def standing(self) -> list[AnswerRecord]:
        """The answers that are not withdrawn."""
        with self._lock:
            return [answer for answer in self._last.values() if answer.preferred is not None]

    def reviewers_of(self, number: int) -> set[str]:
        """Who has answered the row."""
        with self._lock:
            return set(self._reviewers[number])

    def last_of(self, reviewer: str) -> AnswerRecord | None:
        """The last answer of this person that stands."""
        own = [answer for answer in self.standing() if answer.reviewer == reviewer]
        return max(own, key=lambda answer: answer.at, default=None)

    def progress(self) -> ReviewProgress:
        """How far it is."""
        standing = self.standing()
        per_row = Counter(answer.number for answer in standing)
        wanted = self.record.answers_per_row
        return ReviewProgress(
            rows=self.record.rows,
            rows_done=sum(count >= wanted for count in per_row.values()),
            answers=len(standing),
            reviewers=dict(sorted(Counter(each.reviewer for each in standing).items())),
        )

    def public(self) -> Review:
        """The review as the REST contract shows it."""
        fields = self.record.model_dump(exclude={"owner", "rows"})
        return Review(**fields, progress=self.progress())


def _holder(review_id: str, reviewer: str) -> str:
    return f"cwpo:review:{review_id}:held-by:{reviewer}"


def _places(record: ReviewRecord, number: int) -> list[str]:
    """The keys of those who hold a row."""
    row = f"cwpo:review:{record.id}:row:{number}"
    return [f"{row}:{place}" for place in range(record.answers_per_row)]


def _text(value: bytes | str | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _uncertain(dataset: Dataset, below: float) -> Iterator[ReviewPair]:
    for table in dataset.tables(_PARTS_READ):
        for row in table.filter(pc.less(table["confidence"], below)).to_pylist():
            yield ReviewPair.of_row(row)
