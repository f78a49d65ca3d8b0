"""The columns that rows need, under other names."""

import pytest

from cwpo.datasets.naming import LISTS, TRIPLETS, named
from cwpo.errors import ConfigError, DatasetError

ROW = {"question": "why?", "answer_1": "so", "answer_2": "no", "source": "web"}
COLUMNS = {"prompt": "question", "response_a": "answer_1", "response_b": "answer_2"}


def under_names(rows, columns=None, forms=TRIPLETS):
    return [row for _, row in named(enumerate(rows), forms, columns)]


def test_columns_get_the_names_that_are_needed_and_others_stay():
    expected = {"prompt": "why?", "response_a": "so", "response_b": "no", "source": "web"}
    assert under_names([ROW, "no object"], COLUMNS) == [expected, "no object"]
    swapped = {"response_a": "response_b", "response_b": "response_a"}
    row = {"prompt": "p", "response_a": "1", "response_b": "2"}
    assert under_names([row], swapped) == [{"prompt": "p", "response_a": "2", "response_b": "1"}]
    # What the input calls by a name that is given to another column is gone.
    assert under_names([row | {"q": "why?"}], {"prompt": "q"}) == [row | {"prompt": "why?"}]


def test_rows_of_either_form_are_left_alone():
    rows = [
        {"prompt": "p", "response_a": "1", "response_b": "2"},
        {"prompt": "p", "chosen": "1", "rejected": "2", "id": 3},
        {"prompt": "p", "responses": ["1", "2"]},
    ]
    assert under_names(rows, forms=TRIPLETS + LISTS) == rows


def test_a_column_that_no_row_has_is_named_with_those_that_there_are_and_the_flag():
    with pytest.raises(DatasetError) as error:
        under_names([ROW])
    assert str(error.value) == (
        "a row needs the columns prompt, response_a, response_b or prompt, chosen, rejected, and "
        "there is no prompt, response_a, response_b: the columns are question, answer_1, answer_2, "
        "source. Say which is which: --columns "
        "prompt=COLUMN,response_a=COLUMN,response_b=COLUMN (in Python, columns={'prompt': ...})"
    )
    # Of the two forms it is the one that lacks less.
    with pytest.raises(DatasetError, match=r"--columns prompt=COLUMN \(in Python"):
        under_names([{"instruction": "p", "chosen": "1", "rejected": "2"}])
    with pytest.raises(DatasetError, match="no column 'questoin': the columns are question, "):
        under_names([ROW], COLUMNS | {"prompt": "questoin"})
    with pytest.raises(ConfigError, match=r"'promt' is no column that a row needs.* of id, prompt"):
        under_names([ROW], {"promt": "question"})


def test_single_rows_that_lack_a_column_are_for_others_to_reject():
    whole = {"prompt": "p", "response_a": "1", "response_b": "2"}
    rows = [{"prompt": "p"}, whole, "not JSON"]
    assert under_names(rows) == rows
    # None of the first hundred has it.
    many = [{"prompt": "p", "response_a": "1"}] * 100
    with pytest.raises(DatasetError, match="no response_b"):
        under_names([*many, whole])
