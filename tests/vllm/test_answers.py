"""A real vLLM answers as transformers does, from the same folders and with the same flags."""

from __future__ import annotations

import collections
import json
import os

import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cwpo import cli
from cwpo.errors import CwpoError
from cwpo_annotator import Annotator
from cwpo_trainer.commands import Evaluate, Online
from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling
from cwpo_trainer.policy.vllm_policy import Vllm, VllmPolicy
from cwpo_trainer.run.folder import read_lines, read_record
from harness import serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = ["who", "what about the water " * 5, "why not", "hello " * 12, "when", "the people"]
GREEDY = Sampling(max_new_tokens=24, temperature=0, batch_size=8, seed=0)


@pytest.fixture(scope="module")
def policy(tiny_tokenizer, tmp_path_factory):
    """The folder of a model that is sure of its tokens, and ends some answers by the template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        # Heads of 32, the smallest that vLLM has on a CPU.
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    # What every model here would have to switch off to sample from itself alone.
    model.generation_config.repetition_penalty = 3.0
    folder = tmp_path_factory.mktemp("policy") / "policy"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    written = collections.Counter(
        token
        for answer in LoadedPolicy(str(folder), "float32").answers(PROMPTS, GREEDY, None)
        for token in answer.tokens.response_ids[3:]
    )
    ((often, _),) = written.most_common(1)
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer.convert_tokens_to_ids("<|end|>")] = (
            1.5 * model.lm_head.weight[often]
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(policy, tmp_path_factory):
    """The folder of an adapter that changes what that model answers."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), config).save_pretrained(folder)
    return folder


@pytest.fixture
def vllm(vllm_python):
    return Vllm(vllm_python, ())


def test_the_likeliest_answers_are_those_of_transformers(policy, vllm):
    expected = LoadedPolicy(str(policy), "auto").answers(PROMPTS, GREEDY, None)
    assert VllmPolicy(str(policy), "auto", vllm).answers(PROMPTS, GREEDY, None) == expected
    assert {answer.has_ended for answer in expected} == {True, False}
    # Nothing is left of it that holds memory.
    assert not psutil.Process(os.getpid()).children(recursive=True)


def test_an_adapter_answers_as_it_does_in_transformers(policy, adapter, vllm):
    expected = LoadedPolicy(str(adapter), "float32").answers(PROMPTS, GREEDY, None)
    assert VllmPolicy(str(adapter), "float32", vllm).answers(PROMPTS, GREEDY, None) == expected
    assert LoadedPolicy(str(policy), "float32").answers(PROMPTS, GREEDY, None) != expected


def test_tokens_are_drawn_by_their_probabilities_at_the_temperature(policy, vllm):
    draws, temperature = 2000, 2.0
    sampling = Sampling(max_new_tokens=1, temperature=temperature, batch_size=8, seed=3)
    ours = VllmPolicy(str(policy), "float32", vllm)
    answers = ours.answers(["who"] * draws, sampling, None)
    assert answers == ours.answers(["who"] * draws, sampling, None)
    drawn = np.bincount([each.tokens.response_ids[0] for each in answers], minlength=600)
    loaded = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        logits = loaded(torch.tensor([answers[0].tokens.prompt_ids])).logits[0, -1].double()
    assert surprise(drawn, logits / temperature) < 5
    assert surprise(drawn, logits / (temperature - 0.5)) > 10


def surprise(drawn, logits):
    """Pearson's statistic of these counts, in standard deviations above its mean."""
    expected = drawn.sum() * torch.softmax(logits, dim=0).numpy()
    is_usual = expected >= 5
    of_tokens = (drawn[: len(expected)] - expected)[is_usual] ** 2 / expected[is_usual]
    return (of_tokens.sum() - is_usual.sum()) / np.sqrt(2 * is_usual.sum())


def test_an_evaluation_says_the_same_with_either(
    policy, adapter, vllm_python, tiny_annotator, tmp_path
):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    results = {}
    for sampler in ("transformers", "vllm"):
        output = tmp_path / sampler
        flags = ("policy", adapter, "--reference", policy, "--judge", tiny_annotator)
        flags = (*flags, "--data", data, "--output", output, "--sampler", sampler)
        flags = (*flags, "--vllm-python", vllm_python, "--temperature", 0, "--threads", 1)
        cli.run(Evaluate, [*map(str, flags), "--max-new-tokens", "16"], "cwpo evaluate")
        assert read_record(output).settings["sampler"] == sampler
        results[sampler] = read_lines(output / "samples.jsonl")
    assert results["vllm"] == results["transformers"]


def test_online_rounds_are_sampled_from_the_policy_of_the_round_before(
    policy, vllm_python, tiny_annotator, tmp_path
):
    """Each round starts a vLLM with the folder that the round before has left."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    align = tmp_path / "align.yaml"
    align.write_text(
        "max_steps: 8\nbatch_size: 2\ngradient_accumulation: 1\nlearning_rate: 1.0e-1\n"
        "dtype: float32\nthreads: 1\nlora: true\nlora_rank: 2\nadapter_only: true\n"
    )
    with serving(lambda: Annotator.load(tiny_annotator, device="cpu")) as service:
        flags = ("--url", service.url, "--model", policy, "--align", align, "--threads", 1)
        flags = (*flags, "--prompts", prompts, "--rounds", 2, "--max-new-tokens", 12)
        flags = (*flags, "--sampler", "vllm", "--vllm-python", vllm_python)
        output = tmp_path / "online"
        cli.run(Online, [*map(str, flags), "--output", str(output)], "cwpo online")
    assert [line["pairs"] > 0 for line in read_lines(output / "rounds.jsonl")] == [True, True]
    assert not psutil.Process(os.getpid()).children(recursive=True)
    first, second = (output / f"round-{number}" / "policy" for number in (1, 2))
    assert read_record(second).settings["model"] == str(first)
    # What the second round was sampled from answers as it does in transformers, unlike the first.
    expected = LoadedPolicy(str(first), "float32").answers(PROMPTS, GREEDY, None)
    assert (
        VllmPolicy(str(first), "float32", Vllm(vllm_python, ())).answers(PROMPTS, GREEDY, None)
        == expected
    )
    assert LoadedPolicy(str(policy), "float32").answers(PROMPTS, GREEDY, None) != expected


def test_an_argument_that_vllm_does_not_know_is_told(policy, vllm_python):
    vllm = Vllm(vllm_python, ["--no-such-argument"])
    with pytest.raises(CwpoError, match=r"vLLM ended after 0 of 6 answers .*--no-such-argument"):
        VllmPolicy(str(policy), "auto", vllm).answers(PROMPTS, GREEDY, None)
