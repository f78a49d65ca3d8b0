"""Answers by vLLM, whose part a stand-in plays; tests/vllm asks vLLM itself."""

from __future__ import annotations

import json
import os
import sys

import pytest

from cwpo.errors import ConfigError, CwpoError
from cwpo_trainer.commands import Evaluate, Online
from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling
from cwpo_trainer.policy.vllm_policy import Vllm, VllmPolicy, vllm_for
from cwpo_trainer.run.folder import read_lines
from cwpo_trainer.settings.mixins import AnswerSampling

from ..samples import pairs, write_lines

# Answers a prompt with a token that its seed chooses and the first stop, the last prompt first, and
# writes down what it was asked.
STAND_IN = {
    "vllm/__init__.py": """
import json, os
from types import SimpleNamespace

class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        return parser

    @staticmethod
    def from_cli_args(arguments):
        return arguments

class SamplingParams(SimpleNamespace):
    pass

class LLMEngine:
    def __init__(self, arguments):
        print("vLLM prints a lot")
        if "--fail" in arguments:
            raise ValueError("no memory")
        self.asked = []
        self.arguments = arguments

    @classmethod
    def from_engine_args(cls, arguments):
        return cls(arguments)

    def add_request(self, name, prompt, sampling, lora_request):
        self.asked.append((name, prompt, vars(sampling), lora_request))

    def has_unfinished_requests(self):
        with open(os.environ["STAND_IN_ASKED"], "w") as file:
            json.dump([self.arguments, self.asked], file)
        return bool(self.asked)

    def step(self):
        name, prompt, sampling, _ = self.asked.pop()
        ids = [300 + sampling["seed"] % 40, sampling["stop_token_ids"][0]]
        yield SimpleNamespace(finished=False, request_id=name)
        outputs = [SimpleNamespace(token_ids=ids)]
        yield SimpleNamespace(finished=True, request_id=name, outputs=outputs)
""",
    "vllm/engine/arg_utils.py": """
class FlexibleArgumentParser:
    def parse_args(self, arguments):
        return arguments
""",
    "vllm/lora/request.py": "LoRARequest = lambda *words: words",
    "vllm/sampling_params.py": "class RequestOutputKind: FINAL_ONLY = 'final'",
}
PROMPTS = ["who", "what about the water", "why not"]
SAMPLING = Sampling(max_new_tokens=6, temperature=0.5, top_p=0.9, batch_size=2, seed=0)


@pytest.fixture
def python(tmp_path):
    """A Python whose vLLM is the stand-in."""
    for name, text in STAND_IN.items():
        path = tmp_path / "stand-in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = f"#!/bin/sh\nPYTHONPATH={tmp_path}/stand-in STAND_IN_ASKED={tmp_path}/asked.json "
    return executable(tmp_path / "python", f'{script}exec {sys.executable} "$@"\n')


@pytest.fixture
def asked(tmp_path):
    """Gives the arguments and the prompts that the stand-in was asked last."""
    return lambda: json.loads((tmp_path / "asked.json").read_text())


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_vllm_is_asked_for_what_transformers_would_be(python, asked, tiny_causal, tmp_path):
    theirs = LoadedPolicy(str(tiny_causal), "float32")
    ours = VllmPolicy(str(tiny_causal), "auto", Vllm(python, ["--tensor-parallel-size", "2"]))
    answers = ours.answers(PROMPTS, SAMPLING, None)
    openings = theirs.formatter.opening_ids(PROMPTS)
    assert [answer.tokens.prompt_ids for answer in answers] == openings
    first, second, _ = answers
    token, end = first.tokens.response_ids
    assert (end, first.has_ended) == (theirs.tokenizer.convert_tokens_to_ids("<|end|>"), True)
    assert first.text == theirs.tokenizer.decode([token]).strip()
    assert token != second.tokens.response_ids[0]
    arguments, _ = asked()
    words = ("--model", str(tiny_causal), "--dtype", "float32", "--max-model-len")
    assert arguments[:6] == [*words, str(max(map(len, openings)) + 6)]
    assert arguments[-2:] == ["--tensor-parallel-size", "2"]
    assert answers == ours.answers(PROMPTS, SAMPLING, None)


@pytest.mark.slow
def test_all_of_a_round_is_answered_by_vllm_and_none_of_it_by_transformers(
    python, asked, url, tiny_causal, tmp_path, command, failure
):
    align = tmp_path / "align.yaml"
    align.write_text("max_steps: 1\nbatch_size: 2\ndtype: float32\nthreads: 1\n")
    prompts = [{"prompt": row["prompt"]} for row in pairs(3)]
    flags = (
        *("--url", url, "--model", tiny_causal, "--align", align, "--threads", 1),
        *("--prompts", write_lines(tmp_path / "prompts.jsonl", prompts)),
        *("--output", tmp_path / "out", "--vllm-python", python),
    )
    command(Online, *flags, "--rounds", 1)
    tokenizer = LoadedPolicy(str(tiny_causal), "float32").tokenizer
    words = {tokenizer.decode([300 + at]).strip() for at in range(40)}
    rows = read_lines(tmp_path / "out" / "round-1" / "triplets.jsonl")
    assert rows
    assert {row[f"response_{side}"] for row in rows for side in "ab"} <= words
    again = (*flags, "--rounds", 2, "--resume")
    message = failure(Online, *again, "--sampler", "transformers")
    assert "sampler was vllm at the start of this run and is transformers now" in message
    command(Online, *again, "--vllm-arguments=--enforce-eager")
    arguments, _ = asked()
    assert arguments[1] == str(tmp_path / "out" / "round-1" / "policy")
    assert arguments[-1] == "--enforce-eager"


def test_the_end_of_vllm_is_told_in_one_line(python, tiny_causal):
    ours = VllmPolicy(str(tiny_causal), "auto", Vllm(python, ["--fail"]))
    with pytest.raises(CwpoError) as failed:
        ours.answers(PROMPTS, SAMPLING, None)
    message = str(failed.value)
    assert message.startswith(f"vLLM ended after 0 of 3 answers of {tiny_causal}: ")
    assert "ValueError: no memory (its log: /" in message
    assert message.endswith("; --sampler transformers does without vLLM")


def test_vllm_samples_where_it_is_at_hand(python, tmp_path, monkeypatch):
    assert vllm_for(AnswerSampling()) is None
    assert vllm_for(AnswerSampling(sampler="transformers", vllm_python=python)) is None
    for sampler in ("auto", "vllm"):
        settings = AnswerSampling(sampler=sampler, vllm_python=python, vllm_arguments="-a 'b c'")
        assert vllm_for(settings) == (python, ["-a", "b c"])
    # A folder of that name is no vLLM.
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert vllm_for(AnswerSampling()) is None
    with pytest.raises(ConfigError, match="this environment has no vLLM; name the Python of one"):
        vllm_for(AnswerSampling(sampler="vllm"))


def test_an_environment_that_has_vllm_samples_by_it(python, monkeypatch):
    monkeypatch.syspath_prepend(python.with_name("stand-in"))
    monkeypatch.setenv("PYTHONPATH", str(python.with_name("stand-in")), prepend=os.pathsep)
    found = vllm_for(AnswerSampling())
    assert found is not None
    assert str(found.python) == sys.executable


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--sampler", "vllm"), "--sampler vllm: this environment has no vLLM"),
        (("--vllm-python", "nowhere"), "--vllm-python nowhere: No such file"),
        (("--vllm-python", sys.executable), f"`{sys.executable} -m pip install vllm`"),
        (
            ("--sampler", "transformers", "--vllm-arguments", "x"),
            "--vllm-arguments belongs to --sampler vllm",
        ),
    ],
)
def test_vllm_that_is_not_there_is_told_before_anything_is_read(words, reason, tmp_path, failure):
    common = ("--output", tmp_path / "out", *words)
    online = ("--prompts", tmp_path / "none", "--model", "nowhere")
    assert reason in failure(Online, *online, *common)
    evaluated = ("policy", "nowhere", "--reference", "no", "--judge", "no", "--data", "none")
    assert reason in failure(Evaluate, *evaluated, *common)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--sampler", "vllm"), "--sampler vllm belongs to --update rounds: with immediate"),
        (("--vllm-arguments", "x"), "--vllm-arguments belongs to --update rounds"),
    ],
)
def test_immediate_updates_are_sampled_by_transformers(words, reason, tmp_path, failure):
    common = ("--prompts", tmp_path / "none", "--output", tmp_path / "out", "--model", "nowhere")
    assert reason in failure(Online, *common, "--update", "immediate", *words)
