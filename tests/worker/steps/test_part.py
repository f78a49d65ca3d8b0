"""A part holds exactly the rows that `weighted_row` makes one by one."""

import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo import Annotation, Message, Triplet
from cwpo.columns import Column, rows_of
from cwpo.datasets.triplets import NumberedTriplet
from cwpo.datasets.weighted import certificate_in, weighted_row
from cwpo.types import Certificate, FailedAnnotation, ItemError, ModelRef
from cwpo_worker.steps.part import read_part, write_part
from cwpo_worker.steps.shard_rows import ShardRows, read_shard
from cwpo_worker.storage.store import BlobStore

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scores = st.floats(-30, 30, width=32)
labels = st.tuples(st.sampled_from(["a", "b", "tie"]), scores, scores, st.booleans())
CERTIFICATE = Certificate(
    max_error=0.1, delta=0.05, threshold=0.5, coverage=0.3, pairs=300, errors=12
)


@pytest.fixture
def store(tmp_path):
    return BlobStore(str(tmp_path))


def read_table(rows):
    sink = io.BytesIO()
    shard = ShardRows()
    for row in rows:
        shard.add(row)
    shard.write(sink)
    return read_shard(sink.getvalue())


@settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.tuples(texts, texts, texts, labels, st.none() | texts), min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_part_is_made_of_the_same_rows(store, drawn, is_chat, is_calibrated, is_certified):
    certificate = CERTIFICATE if is_certified else None
    rows, answers, expected = [], [], []
    for index, (prompt, a, b, (preferred, of_a, of_b, is_good), note) in enumerate(drawn):
        asked = [Message(role="user", content=prompt)] if is_chat else prompt
        triplet = Triplet(id=f"row-{index}", prompt=asked, response_a=a, response_b=b)
        rows.append(NumberedTriplet(index + 1, triplet, {} if note is None else {"note": [note]}))
        if is_good:
            answer = Annotation(
                id=triplet.id,
                preferred=preferred,
                confidence=0.5 if index % 2 else 0.75,
                score_a=of_a,
                score_b=of_b,
                calibrated_confidence=0.25 if is_calibrated else None,
            )
            beside = {"note": None if note is None else [note]}
            expected.append(weighted_row(triplet, answer, beside, certificate=certificate))
        else:
            error = ItemError(code="too_long", detail="too long")
            answer = FailedAnnotation(id=triplet.id, error=error)
        answers.append(answer)
    key = f"parts/{len(store.list('parts'))}"
    model = ModelRef(name="m", revision="r")
    note = Column(name="note", type="json")
    write_part(store, key, read_table(rows), answers, model, extra=[note], certificate=certificate)
    part = read_part(store, key)
    assert rows_of(part.rows()) == expected
    if expected:
        assert part.columns == [note]
        assert certificate_in(part.schema) == certificate
