"""How many values a JSON text holds is told without parsing it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo import json_values

TEXT = st.text(st.sampled_from('a,{}[]"\\:é\n'), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def tokens(value):
    """The texts of a value, its arrays and objects, and the commas between their members."""
    if isinstance(value, list):
        return 1 + max(len(value) - 1, 0) + sum(map(tokens, value))
    if isinstance(value, dict):
        members = [*value, *value.values()]
        return 1 + max(len(value) - 1, 0) + sum(map(tokens, members))
    return int(isinstance(value, str))


@given(JSON)
def test_texts_arrays_objects_and_commas_are_counted_whatever_the_texts_hold(value):
    body = json.dumps(value).encode()
    assert not json_values.exceeds(body, tokens(value))
    assert tokens(value) == 0 or json_values.exceeds(body, tokens(value) - 1)


@pytest.mark.parametrize("body", [b'"', b'{"a', b"[" * 10, b"", b'"\\', b"\xff,,"])
def test_what_is_no_json_is_counted_too(body):
    assert not json_values.exceeds(body, 10)


def test_prose_is_one_value():
    prose = json.dumps(['said "no, [never], {not} once", he'] * 5).encode()
    assert not json_values.exceeds(prose, 10)
