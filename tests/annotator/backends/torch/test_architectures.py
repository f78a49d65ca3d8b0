"""Every architecture that can annotate scores as Hugging Face does, one text at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import Card, EncodingSpec, write_card

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
DECODERS = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    # Every other layer sees 16 tokens back only, fewer than the texts have.
    "gemma3_text": SMALL
    | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": SMALL | {"sliding_window": 16},
}
ENCODERS = {
    "bert": {key: SMALL[key] for key in list(SMALL)[:4]} | {"max_position_embeddings": 256},
    "modernbert": {key: SMALL[key] for key in list(SMALL)[:4]}
    | {"max_position_embeddings": 256, "cls_token_id": 1, "sep_token_id": 1},
}
WORDS = ["why", "good", "cat", "people", "water", "hello", "thanks", "rude", "kind", "some"]


@pytest.fixture
def triplets():
    rng = np.random.default_rng(3)

    def text(words):
        return " ".join(rng.choice(WORDS, words))

    sizes = [(3, 4, 5), (40, 10, 1), (1, 30, 30), (25, 2, 40), (12, 12, 3)]
    return [Triplet(prompt=text(p), response_a=text(a), response_b=text(b)) for p, a, b in sizes]


def checkpoint(folder, model_type, settings, tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        **settings,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, Card(encoding=EncodingSpec(max_length=200, pad_token="<pad>")))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "settings", "shares"),
    [
        *((name, settings, True) for name, settings in DECODERS.items()),
        *((name, settings, False) for name, settings in ENCODERS.items()),
    ],
)
def test_scores_equal_hugging_face(
    model_type, settings, shares, triplets, tiny_tokenizer, tmp_path
):
    model = checkpoint(tmp_path, model_type, settings, tiny_tokenizer)
    annotator = Annotator.load(tmp_path, dtype="float32", device="cpu")
    annotations = annotator.annotate(triplets)
    with torch.inference_mode():
        expected = [
            [model(torch.tensor([list(ids)])).logits[0, 0].item() for ids in (pair.a, pair.b)]
            for pair in annotator.encode(triplets)
        ]
    scores = [(annotation.score_a, annotation.score_b) for annotation in annotations]
    assert np.std(expected) > 1e-2
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert annotator.backend.shares_prompts == shares


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bert"])
def test_swapping_and_batching_change_nothing(name, triplets, tiny_tokenizer, tmp_path):
    checkpoint(tmp_path, name, (DECODERS | ENCODERS)[name], tiny_tokenizer)
    annotator = Annotator.load(tmp_path, dtype="float32", device="cpu")
    swapped = [
        Triplet(prompt=t.prompt, response_a=t.response_b, response_b=t.response_a) for t in triplets
    ]
    triplets.append(Triplet(prompt="why", response_a="same", response_b="same"))
    swapped.append(triplets[-1])
    margins = [a.score_a - a.score_b for a in annotator.annotate(triplets)]
    assert margins[-1] == 0
    opposite = [a.score_a - a.score_b for a in annotator.annotate(swapped)]
    assert margins == [-margin for margin in opposite]
    alone = [annotator.annotate([t])[0] for t in triplets]
    np.testing.assert_allclose([a.score_a - a.score_b for a in alone], margins, atol=1e-5)
