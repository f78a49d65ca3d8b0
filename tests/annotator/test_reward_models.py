"""Reward models that were not trained here: folders without annotator.json."""

import copy
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from cwpo import Message, Triplet
from cwpo_annotator import Annotator, CheckpointError

TRIPLETS = [
    Triplet(prompt="why cat", response_a="because good", response_b="no"),
    Triplet(prompt="the word", response_a="thanks " * 12, response_b="some people were there"),
    Triplet(
        prompt=[Message(role="user", content="hello")], response_a="sorry", response_b="rude cat"
    ),
]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": SMALL,
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bert": SMALL,
    "modernbert": SMALL | {"cls_token_id": 1, "sep_token_id": 1},
}


@pytest.fixture
def reward_model(tiny_tokenizer, tmp_path):
    """`reward_model("llama", tokenizer, dtype=...)`: a random checkpoint as others publish it."""

    def build(model_type="llama", tokenizer=tiny_tokenizer, dtype=torch.float32, **settings):
        torch.manual_seed(0)
        fields = MODELS[model_type] | {
            "vocab_size": len(tokenizer),
            "num_labels": 1,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "initializer_range": 0.2,
        }
        config = AutoConfig.for_model(model_type, **fields | settings)
        folder = tmp_path / model_type
        AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


def changed(tokenizer, **attributes):
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def assert_scored_as_by(oracle, folder, annotator):
    scores = [(a.score_a, a.score_b) for a in annotator.annotate(TRIPLETS)]
    expected = oracle(folder, annotator.encode(TRIPLETS))
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(scores, expected, atol=2e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_any_architecture_loads_with_defaults_that_are_said(
    reward_model, hugging_face_scores, model_type, caplog
):
    folder = reward_model(model_type)
    with caplog.at_level(logging.WARNING, "cwpo_annotator"):
        annotator = Annotator.load(folder, dtype="float32", device="cpu")
    assert annotator.encoder.max_length == 256
    assert annotator.temperature is None
    (said,) = [record.getMessage() for record in caplog.records if record.name == "cwpo_annotator"]
    assert "annotator.json" in said
    assert "256 tokens" in said
    assert "<pad>" in said
    assert_scored_as_by(hugging_face_scores, folder, annotator)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("pad", ["<eos>", None], ids=["pad is eos", "no pad"])
def test_a_tokenizer_without_a_pad_token_of_its_own(
    reward_model, tiny_tokenizer, hugging_face_scores, model_type, pad
):
    folder = reward_model(model_type, changed(tiny_tokenizer, pad_token=pad))
    annotator = Annotator.load(folder, dtype="float32", device="cpu")
    assert annotator.encoder.pad_token_id != annotator.encoder.tokenizer.eos_token_id
    assert_scored_as_by(hugging_face_scores, folder, annotator)


def test_a_model_that_pads_with_eos_is_read_before_it_as_by_transformers(
    reward_model, tiny_tokenizer
):
    folder = reward_model(tokenizer=changed(tiny_tokenizer, pad_token="<eos>"))
    annotator = Annotator.load(folder, dtype="float32", device="cpu")
    (pair,) = annotator.encode(TRIPLETS[:1])
    eos = annotator.encoder.tokenizer.eos_token_id
    assert pair.a[-1] != eos
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        score = model(torch.tensor([[*pair.a, eos]])).logits[0, 0].item()
    (annotation,) = annotator.annotate(TRIPLETS[:1])
    assert annotation.score_a == pytest.approx(score, abs=2e-4)


def test_a_pad_token_that_the_vocabulary_lacks_changes_no_score(
    reward_model, tiny_tokenizer, hugging_face_scores, tmp_path
):
    folder = reward_model("bert", changed(tiny_tokenizer, pad_token=None))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(tokenizer).replace("<pad>", "<other>")
    (folder / "tokenizer.json").write_text(text)
    annotator = Annotator.load(folder, dtype="float32", device="cpu")
    assert annotator.encoder.spec.pad_token == "<|pad|>"
    assert annotator.encoder.pad_token_id == len(tiny_tokenizer)
    assert_scored_as_by(hugging_face_scores, folder, annotator)


def test_chat_prompts_go_through_the_models_template(reward_model):
    annotator = Annotator.load(reward_model())
    pair = annotator.encode(TRIPLETS)[2]
    decoded = annotator.encoder.tokenizer.decode(pair.b)
    assert decoded == "<|user|>hello<|end|><|assistant|>rude cat<|end|>"


def test_half_precision_weights(reward_model, hugging_face_scores):
    folder = reward_model(dtype=torch.float16)
    annotator = Annotator.load(folder, dtype="float32", device="cpu")
    assert_scored_as_by(hugging_face_scores, folder, annotator)


def test_the_tokenizers_limit_counts_as_well(reward_model, tiny_tokenizer):
    # RoBERTa's two positions more than it can use are such a case.
    folder = reward_model("bert", changed(tiny_tokenizer, model_max_length=100))
    assert Annotator.load(folder).encoder.max_length == 100


@pytest.fixture
def adapter(reward_model, tiny_tokenizer, tmp_path):
    """A PEFT adapter with a head of its own, beside the reward model that it changes."""
    folder = tmp_path / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(reward_model())
    lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(-2)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peft_adapter_scores_as_peft_does(adapter, dtype):
    folder, model = adapter
    annotator = Annotator.load(folder, dtype=dtype, device="cpu")
    scores = [(a.score_a, a.score_b) for a in annotator.annotate(TRIPLETS)]
    with torch.inference_mode():
        expected = [
            [model(torch.tensor([list(ids)])).logits[0, 0].item() for ids in (pair.a, pair.b)]
            for pair in annotator.encode(TRIPLETS)
        ]
    tolerance = 2e-4 if dtype == "float32" else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, atol=tolerance)


def test_an_adapter_changes_the_revision_and_so_does_its_base(adapter, tmp_path):
    folder, _ = adapter
    before = Annotator.load(folder).model.revision
    assert before != Annotator.load(tmp_path / "llama").model.revision
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert Annotator.load(folder).model.revision != before


def rewritten(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edited(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BROKEN = {
    "several outputs": (
        lambda folder: edited(folder, "config.json", id2label={"0": "good", "1": "bad"}),
        "2 outputs",
    ),
    "several outputs in the weights": (
        lambda folder: rewritten(folder, lambda w: w.update({"score.weight": torch.ones(2, 32)})),
        "cannot be loaded",
    ),
    "no head in the weights": (
        lambda folder: rewritten(folder, lambda w: w.pop("score.weight")),
        r"no weights for score\.weight.*train-annotator",
    ),
    "no head at all": (
        lambda folder: edited(folder, "config.json", architectures=["LlamaForCausalLM"]),
        "train-annotator",
    ),
    "pickle weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"pytorch_model\.bin.*run code.*save_pretrained",
    ),
    "remote code": (
        lambda folder: edited(folder, "config.json", auto_map={"AutoModel": "modeling_x.X"}),
        "auto_map.*never run.*transformers' own",
    ),
    "remote tokenizer code": (
        lambda folder: edited(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": "x.X"}),
        r"tokenizer_config\.json.*never run",
    ),
    "an unknown architecture": (
        lambda folder: edited(folder, "config.json", model_type="unheard-of"),
        "unheard-of",
    ),
    "broken weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"not so"),
        "cannot be loaded",
    ),
    "a broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json: not readable",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "the tokenizer cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_annotate_is_refused_with_a_reason_in_one_line(reward_model, name):
    folder = reward_model()
    damage, reason = BROKEN[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as refusal:
        Annotator.load(folder)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder: shutil.rmtree(folder.parent / "llama"),
            "the adapter's base model",
        ),
        (
            lambda folder: edited(
                folder.parent / "llama", "config.json", auto_map={"AutoModel": "x.X"}
            ),
            "auto_map",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(
                folder / "adapter_model.bin"
            ),
            r"adapter_model\.bin",
        ),
    ],
    ids=["no base", "base with remote code", "pickle"],
)
def test_an_adapter_is_refused_with_a_reason(adapter, damage, reason):
    folder, _ = adapter
    damage(folder)
    with pytest.raises(CheckpointError, match=reason):
        Annotator.load(folder)
