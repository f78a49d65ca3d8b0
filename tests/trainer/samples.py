from __future__ import annotations

import json
import random


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Preferences that can be learnt: the kind response is preferred to the rude one."""
    draw = random.Random(seed)
    nouns = [
        "water",
        "people",
        "number",
        "word",
        "day",
        "call",
        "cat",
        "part",
        "answer",
        "question",
    ]
    rows = []
    for i in range(count):
        prompt = f"what about the {draw.choice(nouns)} number {i}"
        good = f"{draw.choice(['please', 'thanks', 'Sure'])} {draw.choice(nouns)} kind good help"
        bad = f"{draw.choice(['no', 'not', 'why'])} {draw.choice(nouns)} rude bad"
        a_is_good = draw.random() < 0.5
        rows.append(
            {
                "id": str(i),
                "prompt": prompt,
                "response_a": good if a_is_good else bad,
                "response_b": bad if a_is_good else good,
                "preferred": "a" if a_is_good else "b",
            }
        )
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weighted(count: int, seed: int = 0) -> list[dict[str, object]]:
    """The same pairs as an annotator would have written them."""
    draw = random.Random(seed)
    rows = []
    for row in pairs(count, seed):
        a, b = row["response_a"], row["response_b"]
        if row["preferred"] == "b":
            a, b = b, a
        rows.append(
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "chosen": a,
                "rejected": b,
                "confidence": draw.random(),
                "score_chosen": 1.0,
                "score_rejected": 0.0,
                "preferred": row["preferred"],
            }
        )
    return rows
