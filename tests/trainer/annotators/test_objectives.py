"""Annotators by implicit reward (eq. 17) and by joint encoding (eq. 20): training to labels."""

from __future__ import annotations

import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from cwpo.types import ScoreItem, Triplet
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.checkpoint import read_card
from cwpo_annotator.encoding.responses import PairwiseError, ResponseEncoder
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.implicit_reward import ResponseReader
from cwpo_trainer.commands import Evaluate, TrainAnnotator
from cwpo_trainer.data.labelled import read_pairs
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import pairs, write_lines

OBJECTIVES = ("dpo", "sft+dpo", "pairrm")
FLAGS = ("--batch-size", 16, "--learning-rate", 3e-3, "--max-length", 64, "--dtype", "float32")
FLAGS += ("--threads", 1)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(120))


@pytest.fixture(scope="module")
def trained(tiny_causal, labelled, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    for objective in OBJECTIVES:
        TrainAnnotator(
            model=str(tiny_causal),
            data=str(labelled),
            output=root / objective,
            objective=objective,
            epochs=6,
            batch_size=16,
            learning_rate=3e-3,
            max_length=64,
            threads=1,
            dtype="float32",
            **({} if objective == "pairrm" else {"beta": 0.2}),
        ).cli_cmd()
    return root


@pytest.fixture(scope="module")
def triplets(labelled):
    return [
        Triplet(prompt=pair.prompt, response_a=pair.chosen, response_b=pair.rejected)
        for pair in read_pairs(str(labelled))[:6]
    ]


def padded(annotator):
    """The annotator as it is for models whose prompts cannot be shared."""
    backend = annotator.backend
    assert backend.shares_prompts
    backend.shares_prompts = False
    for name in ("model", "policy", "reference"):
        if hasattr(backend, name):
            getattr(backend, name).set_attn_implementation("sdpa")
    return annotator


def scores(annotations):
    return np.array([(item.score_a, item.score_b) for item in annotations])


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_ends_as_a_calibrated_annotator(objective, trained):
    folder = trained / objective
    card = read_card(folder)
    assert card.objective == objective
    assert card.beta == (None if objective == "pairrm" else 0.2)
    assert card.held_out.accuracy > 0.9
    assert card.temperature == read_record(folder).results["temperature"] > 0
    assert card.calibration_pairs == 11
    log = read_lines(folder / "training.jsonl")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=0.3)
    assert log[-1]["loss"] < 0.3
    assert (folder / "sft.jsonl").exists() == (objective == "sft+dpo")


def log_prob(model, tokenizer, prompt, response):
    """The definition: the sum over the response's tokens of their log-probabilities."""
    opening = tokenizer(f"{prompt}\n\n")["input_ids"]
    ids = tokenizer(f"{prompt}\n\n{response}{tokenizer.eos_token}", return_tensors="pt").input_ids
    with torch.no_grad():
        every = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return every[len(opening) - 1 :].sum().item()


@pytest.mark.parametrize("objective", ["dpo", "sft+dpo"])
@pytest.mark.parametrize("packed", [True, False])
def test_implicit_scores_equal_a_direct_computation(objective, packed, trained, triplets):
    folder = trained / objective
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference").eval()
    annotator = Annotator.load(folder)
    annotator = annotator if packed else padded(annotator)
    expected = [
        0.2
        * (
            log_prob(policy, tokenizer, triplet.prompt, response)
            - log_prob(reference, tokenizer, triplet.prompt, response)
        )
        for triplet in triplets
        for response in (triplet.response_a, triplet.response_b)
    ]
    given = scores(annotator.annotate(triplets)).ravel()
    np.testing.assert_allclose(given, expected, atol=2e-4)
    assert np.abs(given).max() > 0.1
    items = [ScoreItem(prompt=t.prompt, response=t.response_a) for t in triplets]
    alone = annotator.score_texts(annotator.encode_texts(items)).values
    np.testing.assert_allclose(alone, expected[::2], atol=2e-4)


def test_the_reference_is_the_start_of_dpo(trained, tiny_causal):
    start = AutoModelForCausalLM.from_pretrained(tiny_causal).state_dict()
    for objective, is_start in (("dpo", True), ("sft+dpo", False)):
        path = trained / objective / "reference"
        reference = AutoModelForCausalLM.from_pretrained(path).state_dict()
        assert all(torch.equal(start[name], reference[name]) for name in start) == is_start


@pytest.mark.parametrize("packed", [True, False])
def test_texts_of_several_pairs_are_read_once_in_a_forward_pass(packed, tiny_causal):
    prompt, answers = "what is the word for some people, and why cat?", ["no", "good", "word " * 9]
    several = [
        Triplet(prompt=prompt, response_a=a, response_b=b) for a, b in combinations(answers, 2)
    ]
    pairs = ResponseEncoder.create(tiny_causal, max_length=128).encode_pairs(several)
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    reader = ResponseReader(model, PassBudget(None, "cpu"))
    assert reader.shares_prompts
    if not packed:
        reader.restore()
        reader.shares_prompts = False
    read = []
    embeddings = reader.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    ((places, all_at_once),) = reader.of_pairs(pairs, bfloat16=False)
    sums = all_at_once()
    longest = max(len(text) for pair in pairs for text in pair.texts)
    assert sum(read) <= len(answers) * longest
    reader.restore()
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    alone = {text: log_prob(reader.model, tokenizer, prompt, text) for text in answers}
    expected = [(alone[several[at].response_a], alone[several[at].response_b]) for at in places]
    torch.testing.assert_close(sums.detach(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_supervised_fine_tuning_raises_the_chosen_responses(trained):
    log = read_lines(trained / "sft+dpo" / "sft.jsonl")
    assert log[-1]["loss"] < 0.93 * log[0]["loss"]


def test_pairwise_scores_equal_a_direct_computation(trained, triplets):
    folder = trained / "pairrm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    eos = tokenizer.eos_token

    def logit(prompt, first, second):
        text = f"{prompt}\n\n{first}{eos}{second}{eos}"
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits.item()

    expected = [
        (
            logit(triplet.prompt, triplet.response_a, triplet.response_b),
            logit(triplet.prompt, triplet.response_b, triplet.response_a),
        )
        for triplet in triplets
    ]
    annotations = Annotator.load(folder, dtype="float32").annotate(triplets)
    np.testing.assert_allclose(scores(annotations), expected, atol=1e-4)
    for item in annotations:
        margin = abs(item.score_a - item.score_b)
        assert item.confidence == pytest.approx(np.tanh(margin / 2), abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packed", [True, False])
def test_swapping_the_responses_negates_the_margin(objective, packed, trained, triplets):
    annotator = Annotator.load(trained / objective)
    annotator = annotator if packed else padded(annotator)
    forth = scores(annotator.annotate(triplets))
    swapped = [
        t.model_copy(update={"response_a": t.response_b, "response_b": t.response_a})
        for t in triplets
    ]
    np.testing.assert_array_equal(forth, scores(annotator.annotate(swapped))[:, ::-1])
    same = [t.model_copy(update={"response_b": t.response_a}) for t in triplets]
    assert {item.preferred for item in annotator.annotate(same)} == {"tie"}


def test_a_pairwise_annotator_has_no_score_of_one_response(trained):
    annotator = Annotator.load(trained / "pairrm")
    with pytest.raises(PairwiseError, match="compares two responses"):
        annotator.encode_texts([ScoreItem(prompt="what", response="good")])


def test_a_pairwise_annotator_judges_no_policy(trained, tiny_causal, labelled, tmp_path, command):
    flags = (tiny_causal, "--reference", tiny_causal, "--data", labelled)
    flags += ("--judge", trained / "pairrm", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="compares two responses"):
        command(Evaluate, "policy", *flags)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_vllm_serves_scalar_heads_alone(objective, trained):
    with pytest.raises(CheckpointError, match="--backend torch"):
        Annotator.over_vllm(trained / objective, "http://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_too_long_prompts_are_cut_and_responses_are_not(objective, trained):
    annotator = Annotator.load(trained / objective)
    long = Triplet(prompt="the day" * 100, response_a="kind good help", response_b="rude bad")
    (refused,) = annotator.annotate([long])
    assert refused.error.code == "too_long"
    (cut,) = annotator.annotate([long], "prompt_left")
    assert cut.truncated
    (pair,) = annotator.encode([long], "prompt_left")
    assert max(len(pair.a), len(pair.b)) == 64
    ends = annotator.encoder.tokenizer.decode(pair.a[pair.start :])
    wanted = "kind good help<eos>rude bad<eos>" if objective == "pairrm" else "kind good help<eos>"
    assert ends == wanted


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lora_leaves_plain_models(objective, tiny_causal, labelled, tmp_path, command):
    flags = ("--model", tiny_causal, "--data", labelled, "--objective", objective, *FLAGS)
    flags += ("--lora", "--lora-dropout", 0.3, "--learning-rate", 1e-2, "--max-steps", 30)
    command(TrainAnnotator, *flags, "--output", tmp_path / "out")
    assert read_card(tmp_path / "out").held_out.accuracy > 0.8
    start = load_file(tiny_causal / "model.safetensors")
    end = load_file(tmp_path / "out" / "model.safetensors")
    assert start.keys() <= end.keys() | {"lm_head.weight"}
    changed = {
        name for name in start.keys() & end.keys() if not torch.equal(start[name], end[name])
    }
    assert any("attn" in name for name in changed)
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in changed)


def test_dpo_starts_where_trl_does(tiny_causal, labelled, tmp_path, command):
    rows = read_pairs(str(labelled))[:8]
    source = write_lines(
        tmp_path / "pairs.jsonl",
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in rows],
    )
    flags = ("--model", tiny_causal, "--data", source, "--objective", "dpo", *FLAGS)
    flags += ("--held-out-fraction", 0, "--validation-fraction", 0, "--max-steps", 3)
    flags += ("--batch-size", 8, "--warmup-steps", 0, "--schedule", "linear", "--beta", 0.3)
    command(TrainAnnotator, *flags, "--output", tmp_path / "out")
    ours = [line["loss"] for line in read_lines(tmp_path / "out" / "training.jsonl")]
    assert trl_losses(tiny_causal, rows, tmp_path / "trl") == pytest.approx(ours, rel=2e-3)


def trl_losses(model, rows, folder):
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    dataset = Dataset.from_list(
        [{"prompt": f"{p.prompt}\n\n", "chosen": p.chosen, "rejected": p.rejected} for p in rows]
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(
            output_dir=str(folder),
            beta=0.3,
            max_steps=3,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_reference_that_is_gone_is_said(trained, tmp_path):
    shutil.copytree(trained / "dpo", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "reference")
    with pytest.raises(CheckpointError, match="reference"):
        Annotator.load(tmp_path / "copy")


def test_the_revision_covers_the_reference(trained, tmp_path):
    before = Annotator.load(trained / "dpo").model.revision
    shutil.copytree(trained / "dpo", tmp_path / "dpo")
    path = tmp_path / "dpo" / "reference" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).mul_(2)
    save_file(weights, path, metadata={"format": "pt"})
    assert Annotator.load(tmp_path / "dpo").model.revision != before


@pytest.mark.parametrize("objective", ["bt", *OBJECTIVES])
def test_weights_that_are_no_numbers_are_refused(objective, tiny_causal, tmp_path, command):
    folder = shutil.copytree(tiny_causal, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = write_lines(tmp_path / "pairs.jsonl", pairs(40))
    flags = ("--model", folder, "--data", source, "--objective", objective)
    with pytest.raises(SystemExit, match=r"layers\.1\.mlp\.up_proj\.weight contains NaN"):
        command(TrainAnnotator, *flags, "--output", tmp_path / "out")


def test_a_tokenizer_that_ends_no_text_is_refused(tiny_causal, labelled, tmp_path, command):
    folder = shutil.copytree(tiny_causal, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    flags = ("--model", folder, "--data", labelled, "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="no EOS token and ends no text by itself"):
        command(TrainAnnotator, *flags)


def test_an_encoder_is_no_language_model(tiny_tokenizer, labelled, tmp_path, command):
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path / "bert"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=len(tiny_tokenizer), num_attention_heads=4, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    flags = ("--model", folder, "--data", labelled, "--objective", "dpo")
    with pytest.raises(SystemExit, match="not a causal language model"):
        command(TrainAnnotator, *flags, "--output", tmp_path / "out")
