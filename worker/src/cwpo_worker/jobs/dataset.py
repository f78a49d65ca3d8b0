"""The dataset of a job as it is published: the list of its parts, and what they are together.

The list is in pages, each a blob of its own, so that nobody has to hold a list that grows with the
job. The summary is published last: there is a dataset once it exists.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from cwpo.types import DatasetColumn, DatasetPart, DatasetParts, ModelRef
from cwpo_worker.errors import (
    BlobNotFoundError,
    DatasetFormError,
    InvalidCursorError,
    UnknownPartError,
)
from cwpo_worker.jobs.confidences import (
    Confidences,
    ConfidentRow,
    DatasetConfidences,
    Place,
    confident_rows,
)
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.storage.store import BlobStore, StoredBlob

PAGE_PARTS = 1000
# Up to here a dataset is also merged into single files.
MERGED_ROWS = 2_000_000
MERGED_BYTES = 2 << 30

_READERS = 4

M = TypeVar("M", bound=BaseModel)

_NAME = re.compile(r"part-(\d{8})\.parquet", re.ASCII)
_CURSOR = re.compile(r"\d{1,8}", re.ASCII)


class CheckedPart(BaseModel):
    """A part that was found to be whole: its shard, its rows and failed ones, its content.

    annotated: number of input rows that its rows come from; None if it is that of its rows.
    is_completed: the dataset has a copy with columns that were not known when it was annotated.
    """

    index: int
    rows: int
    annotated: int | None = None
    failed: int
    bytes: int
    sha256: str
    is_completed: bool = False


class Kind(BaseModel):
    """What all parts of a dataset have in common: the columns, and the annotator."""

    columns: list[DatasetColumn]
    model: ModelRef | None


class PartsPage(BaseModel):
    """The checked parts of PAGE_PARTS consecutive shards.

    kind: None if no row is annotated.
    confidences: None in a page that an earlier version wrote.
    """

    parts: list[CheckedPart]
    kind: Kind | None
    confidences: Confidences | None = None


class Summary(BaseModel):
    """What the parts are together.

    rows: number of rows of the dataset.
    annotated: number of input rows that they come from; None if it is that of the rows.
    failed: number of rows that the errors file has besides the rejected ones.
    bytes: of the parts that have rows; the others do not belong to the dataset.
    pages: number of pages, of which those without a part are not there.
    merged: checksum (SHA-256) of each single file, by format, where it is known.
    confidences: None if an earlier version has merged any of the parts.
    """

    rows: int
    annotated: int | None = None
    failed: int
    bytes: int
    pages: int
    kind: Kind | None
    merged: dict[str, str] = {}
    confidences: Confidences | None = None

    @property
    def input_rows(self) -> int:
        """Number of input rows that are annotated."""
        return self.rows if self.annotated is None else self.annotated


class Dataset:
    """The published dataset of a job.

    Args:
        folder: the job's, of the edition that was published.
    """

    def __init__(self, store: BlobStore, folder: JobFolder) -> None:
        self._store = store
        self._folder = folder

    def summary(self) -> Summary | None:
        """The summary; None if the dataset is not published."""
        return self._read(self._folder.dataset, Summary)

    def page(self, number: int) -> PartsPage | None:
        """A page of checked parts; None if it is not there (yet)."""
        return self._read(self._folder.page(number), PartsPage)

    def publish_page(self, number: int, page: PartsPage) -> None:
        """Publish a page, unless it is there."""
        self._publish(self._folder.page(number), page)

    def publish(self, summary: Summary) -> None:
        """Publish the dataset, unless it is there; its pages and files have to be there."""
        self._publish(self._folder.dataset, summary)

    def parts(self, cursor: str | None, url_seconds: int | None) -> DatasetParts:
        """A page as clients see it.

        Args:
            url_seconds: how long presigned URLs are valid; None for no such URLs.
        Raises: InvalidCursorError; DatasetFormError if there is no list of parts.
        """
        summary = self._published()
        number = int(cursor) if cursor and _CURSOR.fullmatch(cursor) else 0
        if cursor is not None and not 0 < number < summary.pages:
            raise InvalidCursorError("the cursor is not the next_cursor of a page of parts")
        page = self.page(number)
        checked = [] if page is None else [part for part in page.parts if part.rows]
        following = number + 1
        return DatasetParts(
            parts=[self._public(part, url_seconds) for part in checked],
            columns=[] if summary.kind is None else summary.kind.columns,
            rows=summary.rows,
            bytes=summary.bytes,
            next_cursor=str(following) if following < summary.pages else None,
        )

    def confidences(self) -> DatasetConfidences:
        """How its confidences are distributed, with the texts of the rows at the ends.

        Raises: DatasetFormError for a job of an earlier version.
        """
        summary = self._published()
        found = summary.confidences
        if found is None:
            raise DatasetFormError(
                "this job was merged by an earlier version, which did not count its confidences"
            )
        texts = self._texts([*found.highest, *found.lowest])
        return DatasetConfidences(
            rows=summary.rows,
            counts=found.counts,
            most_confident=texts[: len(found.highest)],
            least_confident=texts[len(found.highest) :],
        )

    def tables(self, most: int) -> Iterator[pa.Table]:
        """The rows of its parts, a table each; of more than `most` parts, so many spread evenly.

        Raises: DatasetFormError for a job of an earlier version, which kept no list of parts.
        """
        pages = map(self.page, range(self._published().pages))
        parts = [part for page in pages if page is not None for part in page.parts if part.rows]
        for at in range(min(most, len(parts))):
            part = parts[at * len(parts) // min(most, len(parts))]
            with self._store.open(self._key(part)) as source, pq.ParquetFile(source) as file:
                yield file.read()

    def open(self, name: str) -> StoredBlob:
        """A part by its name; its version is its checksum.

        Raises: UnknownPartError; DatasetFormError if there is no list of parts.
        """
        self._published()
        found = _NAME.fullmatch(name)
        index = int(found[1]) if found else -1
        page = self.page(index // PAGE_PARTS) if found else None
        for part in [] if page is None else page.parts:
            if part.index == index and part.rows:
                blob = self._store.stored(self._key(part))
                return blob._replace(version=part.sha256, sha256=part.sha256)
        raise UnknownPartError(f"the dataset has no part {name[:64]!r}")

    def open_merged(self, job_id: str, format: str) -> StoredBlob:
        """The dataset as a single file. Raises: DatasetFormError if there is none."""
        summary = self.summary()
        try:
            blob = self._store.stored(self._folder.results(format))
            return blob._replace(sha256=None if summary is None else summary.merged.get(format))
        except BlobNotFoundError:
            raise DatasetFormError(
                f"the dataset of job {job_id} is a folder of parts, and no single file: see "
                f"/jobs/{job_id}/parts, or run `cwpo jobs download {job_id} -o FOLDER/`"
            ) from None

    def _texts(self, places: Sequence[Place]) -> list[ConfidentRow]:
        """The rows at these places, in order; each part is read once."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        for place in places:
            rows_of[place.part].append(place.row)
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(self._rows, rows_of, rows_of.values())
            found = dict(zip(rows_of, map(iter, read), strict=True))
        return [next(found[place.part]) for place in places]

    def _rows(self, index: int, numbers: Sequence[int]) -> list[ConfidentRow]:
        page = self.page(index // PAGE_PARTS)
        (part,) = [each for each in ([] if page is None else page.parts) if each.index == index]
        with self._store.open(self._key(part)) as source, pq.ParquetFile(source) as file:
            return confident_rows(file.read([*ConfidentRow.model_fields]), numbers)

    def _published(self) -> Summary:
        summary = self.summary()
        if summary is None:
            raise DatasetFormError(
                "this job was merged by an earlier version, which kept no list of parts: "
                "download its results"
            )
        return summary

    def _public(self, part: CheckedPart, url_seconds: int | None) -> DatasetPart:
        return DatasetPart(
            name=f"part-{part.index:08d}.parquet",
            rows=part.rows,
            bytes=part.bytes,
            sha256=part.sha256,
            url=None
            if url_seconds is None
            else self._store.signed_url(self._key(part), url_seconds),
        )

    def _key(self, part: CheckedPart) -> str:
        key = self._folder.completed_part if part.is_completed else self._folder.part
        return key(part.index)

    def _read(self, key: str, model: type[M]) -> M | None:
        try:
            return model.model_validate_json(self._store.read(key))
        except BlobNotFoundError:
            return None

    def _publish(self, key: str, content: BaseModel) -> None:
        with self._store.create(key) as blob:
            blob.write(content.model_dump_json().encode())
