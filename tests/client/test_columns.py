import datetime
import decimal
import io
import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo import Annotation
from cwpo.columns import Column, rows_of
from cwpo.datasets.triplets import NumberedTriplet, RejectedRow, extra_columns, read_triplets
from cwpo.datasets.weighted import weighted_row, weighted_writer
from cwpo.errors import DatasetError

OURS = {"prompt": "p", "response_a": "a", "response_b": "b"}
TRL = {"prompt": "p", "chosen": "a", "rejected": "b"}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("ab"), inner)
)


def read(rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return list(read_triplets(io.BytesIO(data), "jsonl"))


def types(*given):
    """The type of a column that holds these values."""
    (column,) = extra_columns(read([OURS | {"x": value} for value in given]))
    return column.type


def parquet(items):
    """The weighted dataset of the items, as Parquet."""
    sink = io.BytesIO()
    with weighted_writer(sink, "parquet", None, extra_columns(items)) as writer:
        label = Annotation(id="x", preferred="a", confidence=0.5, score_a=2.0, score_b=1.0)
        writer.write([weighted_row(item.triplet, label, item.extra) for item in items])
    return pq.read_table(io.BytesIO(sink.getvalue()))


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from("xyz"), values), min_size=1))
def test_every_value_comes_back_as_it_was(extras):
    items = read([OURS | extra for extra in extras])
    names = {name for extra in extras for name in extra}
    for row, extra in zip(rows_of(parquet(items)), extras, strict=True):
        assert {name: row[name] for name in names} == {name: extra.get(name) for name in names}


@pytest.mark.parametrize(
    ("given", "type"),
    [
        ([True, None], "boolean"),
        ([1, -5, 2**63 - 1], "integer"),
        ([1, 0.5], "number"),
        (["a", None], "text"),
        ([None], "text"),
        ([1, "1"], "json"),
        ([True, 1], "json"),
        ([2**63], "json"),
        ([2**53 + 1, 0.5], "json"),
        ([[1]], "json"),
        ([{"a": 1}, "b"], "json"),
    ],
)
def test_a_column_has_the_plainest_type_that_changes_no_value(given, type):
    assert types(*given) == type


def test_columns_stand_behind_the_dataset_s_own_in_the_order_of_their_appearance():
    table = parquet(read([OURS | {"source": "s"}, OURS | {"n": 1, "source": "t"}]))
    assert table.column_names[-3:] == ["preferred", "source", "n"]
    assert table.column("n").to_pylist() == [None, 1]
    assert table.schema.field("n").type == pa.int64()


def test_nested_values_are_json_text_that_says_so():
    field = parquet(read([OURS | {"tags": ["ü", 1]}])).schema.field("tags")
    assert (field.type, field.metadata) == (pa.string(), {b"cwpo.type": b"json"})


@pytest.mark.parametrize("row", [OURS, TRL])
@pytest.mark.parametrize(
    "name", ["confidence", "score_chosen", "score_rejected", "calibrated_confidence"]
)
def test_a_row_with_a_name_that_the_annotation_needs_is_rejected_by_name(row, name):
    good, bad = read([row, row | {name: None}])
    assert isinstance(good, NumberedTriplet)
    assert bad.error.code == "invalid_row"
    assert bad.error.detail.startswith(f"the column name '{name}' is reserved")
    assert "rename the column" in bad.error.detail


def test_a_row_that_goes_by_both_namings_is_rejected():
    ours, trl = read([OURS | {"chosen": "c"}, TRL | {"response_b": "c"}])
    assert "'chosen'" in ours.error.detail
    assert "'response_b'" in trl.error.detail


def test_a_labelled_file_can_be_annotated_and_its_label_is_no_column():
    (row,) = read([OURS | {"preferred": "b", "kind": "k"}])
    assert row.extra == {"kind": "k"}


def test_numbers_that_are_none_become_null():
    data = json.dumps(OURS)[:-1] + ', "x": NaN, "y": [1, -Infinity], "z": 1e999}'
    (row,) = read_triplets(io.BytesIO(data.encode()), "jsonl")
    assert row.extra == {"x": None, "y": [1, None], "z": None}


@pytest.mark.parametrize("extra", [{"x": "\ud83d"}, {"x": [{"y": "\ud83d"}]}, {"\ud83d": 1}])
def test_text_that_is_no_unicode_rejects_its_row_alone(extra):
    before, bad, after = read([OURS, OURS | extra, OURS])
    assert isinstance(bad, RejectedRow)
    assert (bad.row, bad.error.code) == (2, "invalid_text")
    assert isinstance(before, NumberedTriplet)
    assert isinstance(after, NumberedTriplet)


def test_names_that_vary_with_the_row_are_too_many():
    rows = [OURS | {f"key {number}": 1} for number in range(1001)]
    with pytest.raises(DatasetError, match="1,000 different extra columns"):
        extra_columns(read(rows))


def from_parquet(table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return list(read_triplets(io.BytesIO(sink.getvalue()), "parquet"))


def test_parquet_columns_go_the_same_way():
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    extras = [
        {
            "n": 1,
            "f": 0.5,
            "t": ["a"],
            "o": {"k": 1},
            "at": moment,
            "price": decimal.Decimal("1.50"),
        },
        {"n": None, "f": 1.5, "t": [], "o": None, "at": None, "price": None},
    ]
    items = from_parquet(pa.Table.from_pylist([OURS | extra for extra in extras]))
    assert extra_columns(items) == [
        Column(name=name, type=type)
        for name, type in [
            ("n", "integer"),
            ("f", "number"),
            ("t", "json"),
            ("o", "json"),
            ("at", "text"),
            ("price", "text"),
        ]
    ]
    first, second = rows_of(parquet(items))
    assert (first["t"], first["o"], first["price"]) == (["a"], {"k": 1}, "1.50")
    assert datetime.datetime.fromisoformat(first["at"]) == moment
    assert (second["n"], second["t"], second["o"], second["at"]) == (None, [], None, None)


def test_parquet_that_json_has_no_form_for_is_refused_by_name():
    with pytest.raises(DatasetError, match=r"row 1: the column 'blob' cannot be kept: .*bytes"):
        from_parquet(pa.Table.from_pylist([OURS | {"n": 1, "blob": b"\xff"}]))


def test_equal_inputs_of_every_format_give_equal_rows():
    rows = [OURS | {"id": str(n), "source": f"s{n}", "n": n} for n in range(5)]
    chat = [{**row, "prompt": [{"role": "user", "content": "p"}]} for row in rows]
    for same in (rows, chat):
        both = [read(same), from_parquet(pa.Table.from_pylist(same))]
        assert both[0] == both[1]
        assert all(left.extra != right.extra for left, right in pairwise(both[0]))
