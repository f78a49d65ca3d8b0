"""Policies that vLLM samples from, in a process and an environment of its own.

The process loads the policy, answers, and ends, so that its memory is free for what comes then.
vLLM gets token ids and returns some, so that texts are read and written as with transformers.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig

from cwpo.errors import ConfigError, CwpoError
from cwpo.progress import Progress
from cwpo_annotator.backends.vllm.process import CPU_ARGUMENTS, VllmProcess
from cwpo_annotator.checkpoint import base_folder, is_adapter, resolve
from cwpo_trainer.policy.adapters import read_config
from cwpo_trainer.policy.loading import generation_config, load_tokenizer
from cwpo_trainer.policy.sampling import AnsweringPolicy, LoadedPolicy, Sampling, free_memory
from cwpo_trainer.settings.mixins import AnswerSampling, DType, SamplerName

_PROGRAM = Path(__file__).with_name("vllm_generation.py")
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
# In one process, the order in which vLLM takes up prompts is always the same, and so are answers.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# That vLLM knows.
_ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# vLLM's own default; and of what others leave of a GPU's memory, the share that it is to take.
_MOST_MEMORY, _SHARE_OF_FREE = 0.9, 0.95
# Of a process that has nothing more to say than why it failed.
_SECONDS_TO_EXIT = 10.0


class Vllm(NamedTuple):
    """Where vLLM is, and more of its command line."""

    python: Path
    arguments: Sequence[str]


def vllm_for(settings: AnswerSampling) -> Vllm | None:
    """The vLLM that is to sample answers; None where transformers is.

    Raises: ConfigError where it is asked for and not there.
    """
    if settings.sampler == "transformers":
        return None
    python = settings.vllm_python
    if python is None and _is_here():
        python = Path(sys.executable)
    if python is None:
        if settings.sampler == "auto":
            return None
        raise ConfigError(
            "--sampler vllm: this environment has no vLLM; name the Python of one that has it, "
            "--vllm-python .../bin/python"
        )
    try:
        found = subprocess.run([python, "-c", _HAS_VLLM], check=False)  # noqa: S603
    except OSError as error:
        raise ConfigError(f"--vllm-python {python}: {error.strerror}") from error
    if found.returncode:
        raise ConfigError(
            f"--vllm-python {python}: its environment has no vLLM; `{python} -m pip install vllm`, "
            "or --sampler transformers"
        )
    return Vllm(python, shlex.split(settings.vllm_arguments))


def sampler_of(vllm: Vllm | None) -> SamplerName:
    """What samples, by name."""
    return "transformers" if vllm is None else "vllm"


def policy_to_ask(path: str, dtype: DType, vllm: Vllm | None) -> AnsweringPolicy:
    """The policy, to be sampled from by vLLM, or by transformers without."""
    return LoadedPolicy(path, dtype) if vllm is None else VllmPolicy(path, dtype, vllm)


class VllmPolicy(AnsweringPolicy):
    """A policy that vLLM loads whenever it is asked.

    Args:
        path: folder or Hub id of a model, or of an adapter, which is not merged.
        dtype: number format; `auto` is that in which the policy is stored.
    """

    def __init__(self, path: str, dtype: DType, vllm: Vllm) -> None:
        self._path = path
        self._folder = resolve(path)
        self._base = base_folder(self._folder)
        config = AutoConfig.from_pretrained(self._base, trust_remote_code=False)
        stored = str(config.dtype or torch.float32).removeprefix("torch.")
        self._dtype = stored if dtype == "auto" else dtype
        self._vllm = vllm
        super().__init__(load_tokenizer(self._folder), generation_config(self._base, config))

    def continued(
        self, openings: Sequence[list[int]], sampling: Sampling, work: str | None
    ) -> Iterator[tuple[int, list[int]]]:
        """See AnsweringPolicy. Raises: CwpoError where vLLM ends before it has answered."""
        if not openings:
            return
        # What an earlier training of this process has left of itself.
        free_memory()
        asked = {
            "arguments": self._arguments(max(map(len, openings)) + sampling.max_new_tokens),
            "adapter": str(self._folder) if is_adapter(self._folder) else None,
            "sampling": {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                # At these tokens, and at no others of the model's or the tokenizer's.
                "stop_token_ids": self.stops,
                "ignore_eos": True,
                "detokenize": False,
            },
            "prompts": openings,
            "seeds": [_seed(sampling.seed, at) for at in range(len(openings))],
        }
        process = VllmProcess(
            self._vllm.python,
            [str(_PROGRAM)],
            on_cpu=not torch.cuda.is_available(),
            environment=_ENVIRONMENT,
        )
        done = 0
        try:
            running = process.start(talks=True)
            with Progress(
                work or "", unit="answers", total=len(openings), is_quiet=work is None
            ) as progress:
                for place, ids in _talk(running.stdin, running.stdout, asked):
                    yield place, ids
                    done += 1
                    progress.advance()
            with suppress(subprocess.TimeoutExpired):
                running.wait(_SECONDS_TO_EXIT)
        finally:
            process.stop()
        if done < len(openings):
            raise CwpoError(
                f"vLLM ended after {done:,} of {len(openings):,} answers of {self._path}: "
                f"{process.last_words()}; --sampler transformers does without vLLM"
            )

    def _arguments(self, length: int) -> list[str]:
        """Of vLLM's command line, for texts of at most this length."""
        arguments = ["--model", str(self._base), "--dtype", self._dtype]
        arguments += ["--max-model-len", str(length), "--skip-tokenizer-init"]
        if is_adapter(self._folder):
            rank = read_config(self._folder).r
            known = next((each for each in _ADAPTER_RANKS if each >= rank), rank)
            arguments += ["--enable-lora", "--max-lora-rank", str(known)]
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            share = min(_MOST_MEMORY, _SHARE_OF_FREE * free / total)
            arguments += ["--gpu-memory-utilization", f"{share:.3f}"]
        else:
            arguments += CPU_ARGUMENTS
        return [*arguments, *self._vllm.arguments]


def _talk(
    questions: IO[bytes] | None, answers: IO[bytes] | None, asked: dict[str, Any]
) -> Iterator[tuple[int, list[int]]]:
    assert questions is not None and answers is not None  # noqa: PT018, S101
    # Of a process that has ended, the log says more.
    with suppress(BrokenPipeError), questions:
        questions.write(json.dumps(asked).encode())
    with answers:
        for line in answers:
            place, ids = json.loads(line)
            yield place, ids


def _seed(seed: int, place: int) -> int:
    """Of one answer, so that it does not depend on what vLLM computes beside it."""
    return int(np.random.SeedSequence((seed % 2**63, place)).generate_state(1)[0])


def _is_here() -> bool:
    found = find_spec("vllm")
    # A folder of that name is none.
    return found is not None and found.origin is not None
