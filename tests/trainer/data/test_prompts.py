from __future__ import annotations

import pytest

from cwpo.errors import DatasetError
from cwpo_trainer.data.prompts import drawn_prompts, read_prompts_and_pairs
from cwpo_trainer.data.unused_rows import UnusedRows

from ..samples import pairs, write_lines


def read(path, max_share=0.5):
    return read_prompts_and_pairs(str(path), UnusedRows(max_share))


def test_prompts_come_alone_or_with_labelled_pairs(tmp_path):
    rows = pairs(4)
    rows[3]["prompt"] = rows[0]["prompt"]
    distinct = [row["prompt"] for row in rows[:3]]
    assert read(write_lines(tmp_path / "pairs.jsonl", rows))[0] == distinct
    assert len(read(tmp_path / "pairs.jsonl")[1]) == 4
    alone = [{"prompt": row["prompt"], "topic": "x"} for row in rows]
    assert read(write_lines(tmp_path / "prompts.jsonl", alone)) == (distinct, [])
    # Whole dialogues have their prompts in them.
    dialogue = "\n\nHuman: why\n\nAssistant: "
    whole = [{"chosen": f"{dialogue}so", "rejected": f"{dialogue}no"}]
    prompts, labelled = read(write_lines(tmp_path / "whole.jsonl", whole))
    assert prompts == [labelled[0].prompt]
    assert labelled[0].chosen.strip() == "so"


def test_rows_that_cannot_be_read_tell_nothing_of_the_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": \n{"prompt": "who"}\n')
    assert read(path) == (["who"], [])
    with pytest.raises(DatasetError, match="row 1"):
        read(path, max_share=0)


def test_one_prompt_of_each_conversation_is_drawn_always_the_same():
    first = "\n\nHuman: hello\n\nAssistant:"
    talks = [first, f"{first} hi\n\nHuman: why\n\nAssistant:", "a", "b", "c", "d"]
    drawn = drawn_prompts(talks, 9, seed=0)
    assert len(drawn) == 5
    assert drawn[1:] == talks[2:]
    few = drawn_prompts(talks, 3, seed=0)
    assert few == drawn_prompts(talks, 3, seed=0)
    assert len(few) == 3
    assert [*filter(set(few).__contains__, drawn)] == few
