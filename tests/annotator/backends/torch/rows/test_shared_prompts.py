"""Decoders whose layers are compiled, and annotators on a GPU, score as others do."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForSequenceClassification

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.torch.rows import shared_prompts
from cwpo_annotator.backends.torch.rows.packing import pack_texts
from cwpo_annotator.backends.torch.rows.shared_prompts import (
    compile_layers,
    read_row,
    share_prompts,
)

TEXTS = [[5, 7, 9, 11], [*range(3, 40)], [8], [*range(20, 3, -1)]]
WITHOUT_COMPILER = """
import logging, sys
import torch
from test_shared_prompts import TEXTS, decoder, hidden_states
from cwpo_annotator.backends.torch.rows.shared_prompts import compile_layers
logging.basicConfig(stream=sys.stdout)
model = decoder()
before = hidden_states(model)
compile_layers(model)
torch.testing.assert_close(hidden_states(model), before)
"""


def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
    )
    model = LlamaForSequenceClassification(config).eval()
    assert share_prompts(model)
    return model


def seeing_everything_before(module, query, key, value, mask, **_):
    """An attention that takes a row for one text."""
    key, value = (states.repeat_interleave(2, dim=1) for states in (key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_that_mixes_texts_is_not_used(dtype, monkeypatch):
    model = decoder().to(dtype)
    model.set_attn_implementation("sdpa")
    AttentionInterface.register("mixing", seeing_everything_before)
    monkeypatch.setattr(shared_prompts, "IMPLEMENTATIONS", ["mixing"])
    assert not share_prompts(model)
    assert model.config._attn_implementation == "sdpa"


@torch.inference_mode()
def hidden_states(model):
    (row,) = pack_texts(TEXTS, 1024)
    return read_row(model, row)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_layers_compute_the_same(caplog):
    model = decoder()
    before = hidden_states(model)
    compile_layers(model)
    torch.testing.assert_close(hidden_states(model), before, rtol=1e-5, atol=1e-5)
    assert [record for record in caplog.records if record.name == "cwpo_annotator"] == []


@pytest.mark.slow
def test_without_a_compiler_layers_stay_as_they_are_and_a_warning_says_so(tmp_path):
    environment = os.environ | {
        "CXX": "/there/is/no/compiler",
        "CC": "/there/is/no/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.path.dirname(__file__),
    }
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the model's layers are not compiled, and slower for it" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 0.2)])
def test_a_gpu_gives_the_scores_of_a_cpu(tiny_annotator, dtype, tolerance, caplog):
    texts = [f"word {'cat ' * (n % 30)}why" for n in range(90)]
    triplets = [
        Triplet(
            prompt=texts[n], response_a=texts[n + 20], response_b=texts[n + (20 if n % 7 else 40)]
        )
        for n in range(50)
    ]
    swapped = [
        t.model_copy(update={"response_a": t.response_b, "response_b": t.response_a})
        for t in triplets
    ]
    expected = Annotator.load(tiny_annotator, device="cpu", dtype="float32").annotate(triplets)
    annotator = Annotator.load(tiny_annotator, device="cuda", dtype=dtype)
    found, other_way = annotator.annotate(triplets), annotator.annotate(swapped)
    for name in ("score_a", "score_b"):
        difference = np.subtract(*[[getattr(a, name) for a in them] for them in (found, expected)])
        assert np.abs(difference).max() <= tolerance
    assert [(a.score_a, a.score_b) for a in found] == [(a.score_b, a.score_a) for a in other_way]
    assert all(a.preferred == "tie" for n, a in enumerate(found) if n % 7)
    assert "not compiled" not in caplog.text
