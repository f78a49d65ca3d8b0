"""int8 is offered only where its labels were found to be those of float32."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from cwpo import Triplet
from cwpo.errors import ConfigError
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.checkpoint import read_card, write_card
from cwpo_annotator.quantization import QuantizationError, quantize
from cwpo_service.settings import ServeSettings

pytestmark = pytest.mark.slow

WORDS = ["why", "good", "cat", "people", "water", "hello", "thanks", "rude", "kind", "some"]


@pytest.fixture(scope="module")
def triplets():
    rng = np.random.default_rng(5)

    def text():
        return " ".join(rng.choice(WORDS, rng.integers(1, 12)))

    return [
        Triplet(id=str(n), prompt=text(), response_a=text(), response_b=text()) for n in range(150)
    ]


@pytest.fixture(scope="module")
def calibration(triplets, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "triplets.jsonl"
    path.write_text("".join(triplet.model_dump_json() + "\n" for triplet in triplets))
    return path


@pytest.fixture(scope="module")
def clear_cut(tiny_annotator, tmp_path_factory):
    """An annotator whose scores lie far apart, so that rounding cannot turn many labels."""
    folder = tmp_path_factory.mktemp("clear") / "annotator"
    shutil.copytree(tiny_annotator, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(clear_cut, calibration, tmp_path_factory):
    output = tmp_path_factory.mktemp("int8") / "annotator"
    command = [sys.executable, "-m", "cwpo", "quantize", "--annotator", str(clear_cut)]
    command += ["--calibration", str(calibration), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "of 150 triplets" in result.stdout
    assert "compare: 150 of 150 triplets" in result.stderr
    return output


def test_the_copy_records_agreement_and_sample(quantized, clear_cut, calibration):
    check = read_card(quantized).int8
    assert check.agreement >= 0.99
    assert check.pairs == 150
    assert len(check.sample_sha256) == 64
    assert read_card(quantized).encoding == read_card(clear_cut).encoding
    other = quantize(clear_cut, calibration, quantized.parent / "fewer", 120)
    assert other.pairs == 120
    assert other.sample_sha256 != check.sample_sha256


def test_int8_scores_are_near_float32_and_not_the_same(quantized, triplets):
    def scores(dtype):
        annotator = Annotator.load(quantized, dtype=dtype, device="cpu")
        assert annotator.backend.dtype == dtype
        assert annotator.backend.shares_prompts
        return np.array([(a.score_a, a.score_b) for a in annotator.annotate(triplets)])

    exact, rounded = scores("float32"), scores("int8")
    error = np.abs(exact - rounded)
    assert 1e-6 < error.max() < 0.1 * exact.std()


def test_an_int8_score_does_not_depend_on_its_batch_nor_the_order_of_the_responses(
    quantized, triplets
):
    annotator = Annotator.load(quantized, dtype="int8", device="cpu")
    together = annotator.annotate(triplets[:20])
    alone = [annotator.annotate([triplet])[0] for triplet in triplets[:20]]
    margins = np.array([a.score_a - a.score_b for a in together])
    np.testing.assert_allclose([a.score_a - a.score_b for a in alone], margins, atol=1e-2)
    swapped = [
        Triplet(prompt=t.prompt, response_a=t.response_b, response_b=t.response_a)
        for t in triplets[:20]
    ]
    back = [a.score_a - a.score_b for a in annotator.annotate(swapped)]
    np.testing.assert_array_equal(margins, [-margin for margin in back])


def test_an_annotator_whose_labels_turn_is_refused_and_nothing_is_written(
    clear_cut, calibration, tmp_path
):
    folder = tmp_path / "outliers"
    shutil.copytree(clear_cut, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        # One activation far larger than the others leaves no digits to them.
        for layer in model.model.layers:
            layer.input_layernorm.weight[0] = 3e3
            layer.post_attention_layernorm.weight[0] = 3e3
            for linear in (layer.self_attn.v_proj, layer.mlp.up_proj, layer.mlp.gate_proj):
                linear.weight[:, 0] = 0
                linear.weight.mul_(10)
    model.save_pretrained(folder)
    with pytest.raises(QuantizationError, match="at least 99% are needed; use --dtype bfloat16"):
        quantize(folder, calibration, tmp_path / "out", 1000)
    assert not (tmp_path / "out").exists()


def test_int8_without_the_record_is_refused_with_the_way_to_get_it(clear_cut, quantized, tmp_path):
    with pytest.raises(CheckpointError, match="cwpo quantize --annotator"):
        Annotator.load(clear_cut, dtype="int8")
    shutil.copytree(quantized, tmp_path / "poor")
    card = json.loads((tmp_path / "poor" / "annotator.json").read_text())
    card["int8"]["agreement"] = 0.98
    (tmp_path / "poor" / "annotator.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="cwpo quantize"):
        Annotator.load(tmp_path / "poor", dtype="int8")


def test_a_sample_that_is_too_small_and_a_folder_that_exists_are_refused(
    clear_cut, calibration, tmp_path
):
    with pytest.raises(QuantizationError, match=r"99 of its triplets .* at least 100"):
        quantize(clear_cut, calibration, tmp_path / "out", 99)
    bad = tmp_path / "bad.jsonl"
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "confidence": 0.1}
    bad.write_text(json.dumps(row) + "\n")
    with pytest.raises(QuantizationError, match=r"only 0 .* the column name 'confidence'"):
        quantize(clear_cut, bad, tmp_path / "out", 1000)
    with pytest.raises(QuantizationError, match="exists already"):
        quantize(clear_cut, calibration, tmp_path, 1000)


def test_annotators_of_other_objectives_are_refused(quantized, calibration, tmp_path):
    card = read_card(quantized).model_copy(update={"objective": "pairrm"})
    shutil.copytree(quantized, tmp_path / "pairrm")
    write_card(tmp_path / "pairrm", card)
    with pytest.raises(QuantizationError, match="objective bt, not pairrm"):
        quantize(tmp_path / "pairrm", calibration, tmp_path / "out", 1000)


def test_int8_is_for_cpus_and_for_the_torch_backend(quantized, monkeypatch):
    monkeypatch.delenv("CWPO_VLLM_PYTHON", raising=False)
    with pytest.raises(ConfigError, match="int8 is for CPUs"):
        Annotator.load(quantized, dtype="int8", device="cuda")
    with pytest.raises(ValidationError, match="int8 needs --backend torch"):
        ServeSettings(annotator=str(quantized), backend="vllm", vllm_url="http://x", dtype="int8")
