"""Whatever file comes in: each of its rows is in the dataset or in the errors, or the job says why.

Files are made of rows that look like triplets, of others, and of bytes cut or changed afterwards.
"""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo.errors import DatasetError
from cwpo_worker.jobs.manifest import JobFolder

pytestmark = pytest.mark.slow

some = settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXT = st.text(st.characters(), max_size=12)
NAMES = ["id", "prompt", "response_a", "response_b", "chosen", "rejected", "preferred"]
NAME = st.sampled_from([*NAMES, "confidence", "tags", "", "a.b"]) | TEXT
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "robot"]), "content": TEXT}),
    max_size=2,
)
ROW = st.fixed_dictionaries(
    {"prompt": TEXT | MESSAGES, "response_a": TEXT, "response_b": TEXT},
    optional={"id": TEXT | st.integers(), "chosen": TEXT, "confidence": st.floats(), "n": JSON},
) | st.dictionaries(NAME, JSON, max_size=5)
LINE = ROW.map(lambda row: json.dumps(row).encode()) | JSON.map(
    lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
)
LINES = st.lists(LINE | st.binary(max_size=30), max_size=6).map(b"\n".join)


@st.composite
def damaged(draw, files):
    """A file as it is, or cut short, or with one byte changed."""
    data = draw(files)
    if not data or draw(st.integers(0, 3)):
        return data
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + draw(st.sampled_from([b"", bytes([data[at] ^ 255]) + data[at + 1 :]]))


VALID_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
CELLS = {
    pa.string(): VALID_TEXT,
    pa.large_string(): VALID_TEXT,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=9),
    pa.date32(): st.integers(-(2**20), 2**20),
    pa.decimal128(9, 2): st.decimals(-999, 999, places=2),
    pa.list_(pa.string()): st.lists(VALID_TEXT, max_size=2),
    pa.map_(pa.string(), pa.string()): st.lists(st.tuples(VALID_TEXT, VALID_TEXT), max_size=2),
    CHAT: st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "x"]), "content": VALID_TEXT}),
        max_size=2,
    ),
}


@st.composite
def parquet(draw):
    """Columns of a triplet and others, of any type, with nulls."""
    rows = draw(st.integers(0, 5))
    texts = ["prompt", "response_a", "response_b"]
    kinds = {name: pa.string() for name in draw(st.sampled_from([texts, texts[:2], []]))}
    kinds |= draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*CELLS]), max_size=3))
    columns = {
        name: pa.array(draw(st.lists(CELLS[kind] | st.none(), min_size=rows, max_size=rows)), kind)
        for name, kind in kinds.items()
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=draw(st.integers(1, 5)))
    return sink.getvalue()


FILES = {
    "jsonl": damaged(LINES),
    "jsonl.gz": damaged(LINES.map(gzip.compress)),
    "parquet": damaged(parquet()) | st.binary(max_size=40),
}


@pytest.mark.parametrize("format", FILES)
def test_every_row_is_annotated_or_rejected_or_the_job_says_why(house, format):
    @some
    @given(FILES[format])
    def fuzz(data):
        job_id = house.submit(data, format, max_rejected_share=1)
        reason = None
        try:
            house.plan(job_id)
        except DatasetError as error:
            reason = str(error)
        if reason is not None:
            assert reason
            assert "\n" not in reason
            return
        manifest = JobFolder(job_id).read_manifest(house.store)
        for index in manifest.numbers:
            house.annotate(job_id, index)
        house.merge(job_id)
        job = house.ledger.get(job_id, owner=None)
        assert job.state in ("completed", "completed_with_errors")
        rejected = house.errors(job_id)
        assert all(row["detail"] for row in rejected)
        with house.ledger.open_results(job_id, "jsonl", owner=None).stream as lines:
            annotated = sum(1 for _ in lines)
        with house.ledger.open_results(job_id, "parquet", owner=None).stream as file:
            assert pq.read_metadata(file).num_rows == annotated
        assert annotated + len(rejected) == manifest.rows

    fuzz()
