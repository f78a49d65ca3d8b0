"""What the service answers is what Hugging Face computes, one text at a time, in float32."""

import gzip
import json
from pathlib import Path

import numpy as np

from cwpo import Client, Message, Triplet
from cwpo_annotator import Annotator

SAMPLE = Path(__file__).parents[3] / "examples" / "data" / "preferences.jsonl"


def triplets_of(lines, count):
    rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    names = ("id", "prompt", "response_a", "response_b")
    return [Triplet(**{name: row[name] for name in names}) for row in rows]


def check(serve, folder, triplets, hugging_face_scores):
    annotator = Annotator.load(folder, dtype="float32", device="cpu")
    expected = hugging_face_scores(folder, annotator.encode(triplets, "prompt_left"))
    with serve(lambda: annotator) as service, Client(service.url) as client:
        answer = client.annotate(triplets, truncation="prompt_left", batch_size=5)
    scores = np.array([(label.score_a, label.score_b) for label in answer.annotations])
    assert [label.id for label in answer.annotations] == [triplet.id for triplet in triplets]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_sample_pairs(serve, real_annotator, hugging_face_scores):
    triplets = triplets_of(SAMPLE.read_text().splitlines(), 9)
    chat = Triplet(
        id="chat",
        prompt=[Message(role="user", content="Why is the sky blue?")],
        response_a="Because of Rayleigh scattering. 🌌",
        response_b="It reflects the sea.",
    )
    check(serve, real_annotator, [*triplets, chat], hugging_face_scores)


def test_human_preference_data(serve, real_annotator, data_dir, hugging_face_scores):
    with gzip.open(data_dir / "hh_harmless.jsonl.gz", "rt") as lines:
        check(serve, real_annotator, triplets_of(lines, 12), hugging_face_scores)
