from __future__ import annotations

import pytest

from cwpo.types import Message
from cwpo_trainer.evaluation.judge_prompts import preferred, question


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ('Comparison: A is rude, B is kind.\nPrefered: "B"', "b"),
        ("Comparison: both are fine.\nPreferred: A", "a"),
        ("**Prefered:** **A**", "a"),
        ('Prefered: "A" or "B"? I take\nPrefered: "B"', "b"),
        ("Comparison: A better answer.\nB", "b"),
        ('"a".', "a"),
        ("Both are good.", None),
        ("Preferred: Apples", None),
        ("", None),
    ],
)
def test_a_reply_is_read_by_what_it_prefers(reply, says):
    assert preferred(reply) == says


def test_the_questions_are_those_of_the_paper():
    chat = [Message(role="user", content="why {not}?")]
    asked = question("chatbot", chat, "because", " so ")
    assert (
        "Query: Human: why {not}?\n\nAssistant:\n\nResponse A: because\n\nResponse B: so" in asked
    )
    assert 'Prefered: "A" or "B"' in asked
    post = question("summary", "a post", "one", "two")
    assert "Post: a post\n\nSummary A: one\n\nSummary B: two" in post
