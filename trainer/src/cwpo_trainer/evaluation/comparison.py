"""Comparison of policies with their reference: preference accuracy, and scores of sampled answers.

The win share is the share of prompts on which the annotator scores the policy's answer above that
of the reference. With a gold reward model as the annotator, it is the paper's gold reward accuracy
(GRA). An answer that cannot be scored, such as an empty one, loses to any that can.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.datasets.triplets import by_reason
from cwpo.datasets.weighted import JsonlWriter, plain_prompt
from cwpo.errors import ConfigError, DatasetError
from cwpo.types import Prompt
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.data.labelled import LabelledPair, prompt_key, read_pairs
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.evaluation.judging import Judgement, judge, unreadable
from cwpo_trainer.evaluation.metrics import PolicyMetrics
from cwpo_trainer.evaluation.preferences import response_log_probs
from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import ADAPTER_FOLDER, SAMPLES_NAME, new_run_folder
from cwpo_trainer.settings.evaluation import PolicyEvaluation

REFERENCE = "reference"
_THIRDS = 3

# By name of the policy.
Answers = Mapping[str, Sequence[str]]
LogProbs = Mapping[str, NDArray[np.float64]]
Judgements = Mapping[str, Judgement]


def evaluate_policies(settings: PolicyEvaluation) -> None:
    """Measure each policy against the reference and write the output folder.

    Raises: DatasetError, CheckpointError or ConfigError.
    """
    paths = named_paths(settings.policy)
    unused = UnusedRows(settings.max_rejected_share)
    pairs = read_pairs(settings.data, unused)
    prompts = _first_prompts(pairs, settings.prompts)
    for path in (settings.reference, *paths.values()):
        resolve(path)
    recorded = settings.model_dump(mode="json")
    with new_run_folder("evaluate-policy", settings.output, recorded) as output:
        unused.report(output)
        process.prepare(seed=settings.seed, threads=settings.threads)
        annotator = Annotator.load(settings.annotator)
        annotator.check_scores_single()
        output.results["judge"] = {
            **annotator.model.model_dump(mode="json"),
            "reads": annotator.encoder.reads,
        }
        print(f"judge {annotator.model.name} reads: {annotator.encoder.reads}", file=sys.stderr)
        prompts, left_out = _readable(annotator, prompts)
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        log_probs: dict[str, NDArray[np.float64]] = {}
        answers: dict[str, list[str]] = {}
        for name, path in {REFERENCE: settings.reference, **paths}.items():
            loaded = LoadedPolicy(path, settings.dtype)
            log_probs[name] = response_log_probs(
                loaded, pairs, settings.batch_size, f"log-probabilities of {name}"
            )
            answers[name] = loaded.sample(prompts, sampling, f"answers of {name}")
        judgements = {
            name: judge(annotator, prompts, texts, f"judge {name}")
            for name, texts in answers.items()
        }
        metrics, results = compare(log_probs, judgements, left_out, beta=settings.beta)
        output.results |= results
        _write_samples(output.path / SAMPLES_NAME, prompts, answers, judgements)
    _print_summary(metrics, results)


def named_paths(paths: Sequence[str]) -> dict[str, str]:
    """The policies by the name of their folder, an adapter beside a merged model by that of both.

    Raises: ConfigError for two of one name.
    """
    named = {}
    for path in paths:
        *above, name = path.rstrip("/").split("/")
        named["/".join([*above[-1:], name]) if name == ADAPTER_FOLDER else name] = path
    if len(named) != len(paths) or REFERENCE in named:
        raise ConfigError(f"--policy: the folders need different names, other than {REFERENCE!r}")
    return named


def compare(
    log_probs: LogProbs, judgements: Judgements, left_out: Mapping[str, int], *, beta: float
) -> tuple[dict[str, PolicyMetrics], dict[str, Any]]:
    """Each policy's measures against the reference, and all results for run.json.

    A prompt on which the judge itself failed is left out for all policies.

    Args:
        log_probs: of chosen and rejected responses, shape (pairs, 2), by policy.
        judgements: of sampled answers, by policy.
        left_out: number of prompts that the judge could not read, for each reason.
        beta: factor of the implicit reward.
    Raises: DatasetError where the judge failed on all prompts.
    """
    failures = dict(item for judged in judgements.values() for item in judged.failures.items())
    reference = judgements[REFERENCE]
    compared = [at for at in range(len(reference.scores)) if at not in failures]
    left_out = Counter(left_out) + Counter(failures.values())
    if not compared:
        raise DatasetError(f"no prompt could be judged: {by_reason(left_out)}")
    metrics = {
        name: PolicyMetrics(
            **_preferences(beta * (log_probs[name] - log_probs[REFERENCE])),
            **_wins(judged.scores[compared], reference.scores[compared]),
            **_scores(judged, compared),
        )
        for name, judged in judgements.items()
        if name != REFERENCE
    }
    return metrics, {
        "pairs": len(log_probs[REFERENCE]),
        "prompts": len(compared),
        "prompts_left_out": dict(left_out),
        **{f"reference_{name}": value for name, value in _scores(reference, compared).items()},
        "policies": {name: item.model_dump(mode="json") for name, item in metrics.items()},
    }


def _preferences(rewards: NDArray[np.float64]) -> dict[str, float]:
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "preference_accuracy": float(np.where(margins == 0, 0.5, margins > 0).mean()),
        "implicit_margin": float(margins.mean()),
    }


def _wins(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, Any]:
    ours, theirs = (np.nan_to_num(each, nan=-np.inf) for each in (scores, reference))
    wins = np.where(ours == theirs, 0.5, ours > theirs)
    thirds = [part for part in np.array_split(wins, _THIRDS) if part.size]
    return {
        "win_share": float(wins.mean()),
        "win_share_thirds": [float(part.mean()) for part in thirds],
    }


def _scores(judged: Judgement, compared: Sequence[int]) -> dict[str, Any]:
    """Mean score of the answers that have one, their number, and that of the others by reason."""
    scored = [at for at in compared if at not in judged.unscored]
    return {
        "mean_score": float(judged.scores[scored].mean()) if scored else None,
        "scored": len(scored),
        "unscored": dict(Counter(judged.unscored[at] for at in compared if at in judged.unscored)),
    }


def _readable(
    annotator: Annotator, prompts: Sequence[Prompt]
) -> tuple[list[Prompt], Mapping[str, int]]:
    """The prompts that the judge can read, and the number of the others for each reason."""
    problems = unreadable(annotator, prompts)
    reasons = Counter(problems.values())
    if len(problems) == len(prompts):
        raise DatasetError(
            f"the judge can read none of the {len(prompts):,} prompts: {by_reason(reasons)}; it "
            f"reads at most {annotator.encoder.max_length:,} tokens"
        )
    return [prompt for at, prompt in enumerate(prompts) if at not in problems], reasons


def _first_prompts(pairs: Sequence[LabelledPair], count: int) -> list[Prompt]:
    distinct = {prompt_key(pair.prompt): pair.prompt for pair in pairs}
    return [*distinct.values()][:count]


def _write_samples(
    path: Path, prompts: Sequence[Prompt], answers: Answers, judgements: Judgements
) -> None:
    with path.open("wb") as sink:
        JsonlWriter(sink).write(
            {
                "prompt": plain_prompt(prompt),
                "answers": {
                    name: {"answer": texts[at], **_verdict(judgements[name], at)}
                    for name, texts in answers.items()
                },
            }
            for at, prompt in enumerate(prompts)
        )


def _verdict(judged: Judgement, at: int) -> dict[str, float | str | None]:
    """The score of an answer, or None and the reason: JSON knows no NaN."""
    problem = judged.unscored.get(at) or judged.failures.get(at)
    if problem is None:
        return {"score": float(judged.scores[at])}
    return {"score": None, "problem": problem}


def _print_summary(metrics: Mapping[str, PolicyMetrics], results: Mapping[str, Any]) -> None:
    if results["prompts_left_out"]:
        reasons = by_reason(Counter(results["prompts_left_out"]))
        print(f"prompts that could not be judged, left out for all: {reasons}", file=sys.stderr)
    for name, item in metrics.items():
        lost = f", where it loses by answers without a score: {by_reason(Counter(item.unscored))}"
        print(
            f"{name}: preference accuracy {item.preference_accuracy:.1%}, "
            f"scores above the reference on {item.win_share:.1%} of {results['prompts']:,} prompts"
            f"{lost if item.unscored else ''}"
        )
