"""Triplets read from JSON lines and Parquet: good rows, and what becomes of bad ones."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo import Message, RankItem, Triplet
from cwpo.datasets.triplets import (
    NumberedItem,
    NumberedTriplet,
    RejectedRow,
    count_rows,
    file_format,
    read_rows,
    read_triplets,
    rows_of_responses,
)
from cwpo.errors import DatasetError

GOOD = {"id": "x", "prompt": "p", "response_a": "a", "response_b": "b"}


def read(*lines: object, format="jsonl"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return list(read_triplets(io.BytesIO(text.encode("utf-8", "surrogatepass")), format))


def test_our_names_and_those_of_trl_are_read_alike():
    ours, trl = read(GOOD, {"id": "x", "prompt": "p", "chosen": "a", "rejected": "b"})
    assert ours.triplet == trl.triplet == Triplet(**GOOD)
    assert (ours.row, trl.row) == (1, 2)


def test_conversational_trl_rows_are_read():
    (row,) = read(
        {
            "prompt": [{"role": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    )
    assert row.triplet.prompt == [Message(role="user", content="p")]
    assert (row.triplet.response_a, row.triplet.response_b) == ("a", "b")


def test_ids_default_to_the_row_number_and_numbers_become_text():
    without = {key: value for key, value in GOOD.items() if key != "id"}
    assert [row.triplet.id for row in read(without, GOOD | {"id": 7})] == ["1", "7"]


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("{not json", "invalid_row", "not JSON"),
        ("[1, 2]", "invalid_row", "an array"),
        ("3", "invalid_row", "a number"),
        ('{"x": ' + "9" * 5000 + "}", "invalid_row", "too many digits"),
        ({"id": "x", "prompt": "p", "response_a": "a"}, "invalid_row", "response_b is missing"),
        ({"prompt": "p"}, "invalid_row", "chosen is missing"),
        (GOOD | {"prompt": None}, "invalid_row", "prompt is missing"),
        (GOOD | {"response_a": 5}, "invalid_row", "response_a"),
        (GOOD | {"response_b": " \n\t"}, "empty_response", "response_b is empty"),
        (GOOD | {"prompt": []}, "invalid_row", "prompt"),
        (GOOD | {"prompt": [{"role": "robot", "content": "x"}]}, "invalid_row", "role"),
        (GOOD | {"response_a": "\ud83d"}, "invalid_text", "response_a contains half"),
        (GOOD | {"chosen": "a"}, "invalid_row", "the column name 'chosen' is reserved"),
        (GOOD | {"confidence": 1}, "invalid_row", "the column name 'confidence' is reserved"),
        (GOOD | {"x": [0] * 100_001}, "invalid_row", "more than 100,000 JSON values"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_reason(line, code, reason):
    before, bad, after = read(GOOD, line, GOOD)
    assert isinstance(before, NumberedTriplet)
    assert isinstance(after, NumberedTriplet)
    assert isinstance(bad, RejectedRow)
    assert (bad.row, bad.error.code) == (2, code)
    assert reason in bad.error.detail


def test_lines_that_are_not_utf8_are_rejected_alone():
    data = json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n' + json.dumps(GOOD).encode()
    first, bad, last = read_triplets(io.BytesIO(data), "jsonl")
    assert "UTF-8" in bad.error.detail
    assert (first.row, last.row) == (1, 3)


def test_blank_lines_are_no_rows_but_count_as_lines():
    assert [row.row for row in read(GOOD, "", "   ", GOOD, "")] == [1, 4]


def test_text_and_chat_prompts_do_not_mix():
    chat = GOOD | {"prompt": [{"role": "user", "content": "p"}]}
    first, second, third = read(GOOD, chat, GOOD)
    assert isinstance(first, NumberedTriplet)
    assert isinstance(third, NumberedTriplet)
    assert "split the file" in second.error.detail


def test_gzip_is_read_and_a_cut_file_is_an_error():
    data = gzip.compress("\n".join(json.dumps(GOOD) for _ in range(1000)).encode())
    assert len(list(read_triplets(io.BytesIO(data), "jsonl.gz"))) == 1000
    with pytest.raises(DatasetError, match="gzip"):
        list(read_triplets(io.BytesIO(data[:-20]), "jsonl.gz"))


def test_parquet_is_read_and_anything_else_under_that_name_is_an_error():
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD | {"response_a": None}]), sink)
    good, bad = read_triplets(io.BytesIO(sink.getvalue()), "parquet")
    assert good.triplet == Triplet(**GOOD)
    assert "response_a is missing" in bad.error.detail
    with pytest.raises(DatasetError, match="Parquet"):
        list(read_triplets(io.BytesIO(b"no parquet"), "parquet"))


def test_a_name_of_no_known_format_is_refused():
    assert file_format(Path("A.JSONL.GZ")) == "jsonl.gz"
    with pytest.raises(DatasetError, match=r"data\.csv"):
        file_format(Path("data.csv"))


@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz"])
def test_rows_are_counted_as_they_are_read(format):
    lines = b"\n".join([json.dumps(GOOD).encode(), b"", b"{not json", b"   ", b"[]"])
    data = gzip.compress(lines) if format == "jsonl.gz" else lines
    rows = list(read_triplets(io.BytesIO(data), format))
    assert count_rows(io.BytesIO(data), format) == len(rows) == 3


def test_a_line_that_is_too_long_is_one_rejected_row(monkeypatch):
    monkeypatch.setattr("cwpo.datasets.triplets.MAX_LINE_BYTES", 100)
    long = json.dumps(GOOD | {"prompt": "p" * 350})
    first, bad, last = read(GOOD, long, GOOD)
    assert bad.error.detail == "the line is longer than 100 bytes"
    assert (first.row, bad.row, last.row) == (1, 2, 3)


def test_the_rows_of_parquet_are_counted_and_what_is_none_is_an_error():
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD] * 7), sink)
    assert count_rows(io.BytesIO(sink.getvalue()), "parquet") == 7
    with pytest.raises(DatasetError, match="Parquet"):
        count_rows(io.BytesIO(b"no parquet"), "parquet")


LISTED = {"id": "x", "prompt": "p", "responses": ["a", "b", "c"]}


def read_lists(*lines, format="jsonl"):
    if format == "parquet":
        sink = io.BytesIO()
        names = {name for line in lines for name in line}
        whole = [dict.fromkeys(names) | line for line in lines]
        pq.write_table(pa.Table.from_pylist(whole), sink)
        data = sink.getvalue()
    else:
        data = "\n".join(map(json.dumps, lines)).encode()
    return list(rows_of_responses(read_rows(io.BytesIO(data), format)))


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_lists_of_responses_and_triplets_are_read_beside_each_other(format):
    rows = [
        LISTED | {"note": 1},
        {"id": None, "prompt": "p", "response_a": "a", "response_b": "b", "note": 2},
        {"prompt": "q", "responses": ["x", "y"], "note": 3},
    ]
    listed, triplet, last = read_lists(*rows, format=format)
    assert isinstance(listed, NumberedItem)
    assert listed.item == RankItem(**LISTED)
    assert triplet.triplet == Triplet(id="2", prompt="p", response_a="a", response_b="b")
    assert last.item.id == "3"
    assert [row.extra for row in (listed, triplet, last)] == [{"note": n} for n in (1, 2, 3)]


def test_responses_of_chat_rows_may_be_conversations_of_one_turn():
    turn = [{"role": "assistant", "content": "b"}]
    prompt = [{"role": "user", "content": "p"}]
    (row,) = read_lists({"prompt": prompt, "responses": ["a", turn]})
    assert row.item.responses == ["a", "b"]
    assert row.item.prompt == [Message(role="user", content="p")]


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        (LISTED | {"responses": ["a"]}, "invalid_row", "responses: List should have at least 2"),
        (LISTED | {"responses": ["a"] * 65}, "invalid_row", "responses: List should have at most"),
        (LISTED | {"responses": ["a", 3]}, "invalid_row", "responses[1]: Input should be a valid"),
        (LISTED | {"responses": ["a", None]}, "invalid_row", "responses[1]: "),
        (LISTED | {"responses": "ab"}, "invalid_row", "responses: Input should be a valid list"),
        (LISTED | {"responses": ["a", " ", "c"]}, "empty_response", "responses[1] is empty"),
        (LISTED | {"responses": ["a", "\ud83d"]}, "invalid_text", "responses[1] contains half"),
        (LISTED | {"prompt": None}, "invalid_row", "prompt is missing; a row needs prompt and"),
        (LISTED | {"prompt": [{"role": "user", "content": "p"}]}, "invalid_row", "split the file"),
        (LISTED | {"confidence": 1}, "invalid_row", "the column name 'confidence' is reserved"),
        (LISTED | {"prompt_pairs": 1}, "invalid_row", "the column name 'prompt_pairs' is reserved"),
        ({"prompt": "p"}, "invalid_row", "chosen is missing"),
    ],
)
def test_a_bad_list_is_rejected_with_its_line_and_the_place(line, code, reason):
    before, bad, after = read_lists(LISTED, line, LISTED)
    assert isinstance(before, NumberedItem)
    assert isinstance(after, NumberedItem)
    assert isinstance(bad, RejectedRow)
    assert (bad.row, bad.error.code) == (2, code)
    assert reason in bad.error.detail


def test_a_list_is_no_triplet_and_the_error_says_what_to_name():
    (bad,) = read(LISTED)
    assert (bad.id, bad.error.code) == ("x", "invalid_row")
    assert "name best_worst, adjacent or all with --pairs" in bad.error.detail


def test_two_responses_make_a_triplet_whatever_is_listed_beside_them():
    for names in (("response_a", "response_b"), ("chosen", "rejected")):
        line = {"prompt": "p", names[0]: "a", names[1]: "b", "responses": ["a", "b", "c"]}
        for (row,) in (read(line), read_lists(line)):
            assert row.triplet == Triplet(id="1", prompt="p", response_a="a", response_b="b")
            assert row.extra == {"responses": ["a", "b", "c"]}
