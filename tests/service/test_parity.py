"""What the service answers is what Hugging Face computes, one text at a time, in float32."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cwpo import Client, Message, Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.encoding import Encoder

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "preferences.jsonl"


def with_scalar_head(backbone, folder):
    """The real backbone with a random head, as training starts with."""
    torch.manual_seed(0)
    encoder = Encoder.create(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    model.config.pad_token_id = encoder.pad_token_id
    model.save_pretrained(folder)
    encoder.save(folder)
    return folder


def hugging_face_scores(folder, pairs):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.array(
            [
                [model(torch.tensor([list(ids)])).logits[0, 0].item() for ids in (pair.a, pair.b)]
                for pair in pairs
            ]
        )


def triplets_of(lines, count):
    rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    names = ("id", "prompt", "response_a", "response_b")
    return [Triplet(**{name: row[name] for name in names}) for row in rows]


@pytest.fixture(scope="module", params=["smollm2", "minilm"])
def checkpoint(request, real_models, tmp_path_factory):
    return with_scalar_head(
        real_models / request.param, tmp_path_factory.mktemp("checkpoint") / request.param
    )


def check(serve, checkpoint, triplets):
    annotator = Annotator.load(checkpoint, dtype="float32", device="cpu")
    expected = hugging_face_scores(checkpoint, annotator.encode(triplets, "prompt_left"))
    with serve(lambda: annotator) as service, Client(service.url) as client:
        answer = client.annotate(triplets, truncation="prompt_left", batch_size=5)
    scores = np.array([(label.score_a, label.score_b) for label in answer.annotations])
    assert [label.id for label in answer.annotations] == [triplet.id for triplet in triplets]
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_sample_pairs(serve, checkpoint):
    triplets = triplets_of(SAMPLE.read_text().splitlines(), 9)
    chat = Triplet(
        id="chat",
        prompt=[Message(role="user", content="Why is the sky blue?")],
        response_a="Because of Rayleigh scattering. 🌌",
        response_b="It reflects the sea.",
    )
    check(serve, checkpoint, [*triplets, chat])


def test_human_preference_data(serve, checkpoint, data_dir):
    with gzip.open(data_dir / "hh_harmless.jsonl.gz", "rt") as lines:
        check(serve, checkpoint, triplets_of(lines, 12))
