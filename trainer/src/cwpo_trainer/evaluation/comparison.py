"""Comparison of policies with their reference: preference accuracy, and scores of sampled answers.

The win share is the share of prompts on which the annotator scores the policy's answer above that
of the reference. With a gold reward model as the annotator, it is the paper's gold reward accuracy
(GRA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.datasets.weighted import JsonlWriter, plain_prompt
from cwpo.errors import ConfigError, DatasetError
from cwpo.types import ItemError, Prompt, ScoreItem
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.data.labelled import LabelledPair, prompt_key, read_pairs
from cwpo_trainer.evaluation.metrics import PolicyMetrics
from cwpo_trainer.evaluation.preferences import response_log_probs
from cwpo_trainer.policy.sampling import LoadedPolicy, Sampling
from cwpo_trainer.run import process
from cwpo_trainer.run.chunks import chunks
from cwpo_trainer.run.folder import ADAPTER_FOLDER, SAMPLES_NAME, new_run_folder
from cwpo_trainer.settings.evaluation import PolicyEvaluation

REFERENCE = "reference"
_THIRDS = 3
_JUDGED_AT_ONCE = 256

# By name of the policy.
Answers = Mapping[str, Sequence[str]]
Scores = Mapping[str, NDArray[np.float64]]


def evaluate_policies(settings: PolicyEvaluation) -> None:
    """Measure each policy against the reference and write the output folder.

    Raises: DatasetError, CheckpointError or ConfigError.
    """
    paths = named_paths(settings.policy)
    pairs = read_pairs(settings.data)
    prompts = _first_prompts(pairs, settings.prompts)
    for path in (settings.reference, *paths.values()):
        resolve(path)
    recorded = settings.model_dump(mode="json")
    with new_run_folder("evaluate-policy", settings.output, recorded) as output:
        process.prepare(seed=settings.seed, threads=settings.threads)
        annotator = Annotator.load(settings.annotator)
        annotator.check_scores_single()
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
        scores = {
            name: judge(annotator, prompts, texts, f"judge {name}")
            for name, texts in answers.items()
        }
        metrics, results = compare(log_probs, scores, beta=settings.beta)
        output.results |= results
        _write_samples(output.path / SAMPLES_NAME, prompts, answers, scores)
    for name, item in metrics.items():
        print(
            f"{name}: preference accuracy {item.preference_accuracy:.1%}, "
            f"scores above the reference on {item.win_share:.1%} of {results['prompts']:,} prompts"
        )


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
    log_probs: Scores, scores: Scores, *, beta: float
) -> tuple[dict[str, PolicyMetrics], dict[str, Any]]:
    """Each policy's measures against the reference, and all results for run.json.

    Args:
        log_probs: of chosen and rejected responses, shape (pairs, 2), by policy.
        scores: of sampled answers, shape (prompts,), NaN where there is none, by policy.
        beta: factor of the implicit reward.
    Raises: DatasetError where no prompt has an answer of every policy that could be scored.
    """
    judged = np.isfinite(np.stack([*scores.values()])).all(axis=0)
    if not judged.any():
        raise DatasetError("for no prompt could the answers of all policies be scored")
    reference = scores[REFERENCE][judged]
    metrics = {
        name: _metrics(
            beta * (log_probs[name] - log_probs[REFERENCE]), scores[name][judged], reference
        )
        for name in scores
        if name != REFERENCE
    }
    return metrics, {
        "pairs": len(log_probs[REFERENCE]),
        "prompts": int(judged.sum()),
        "prompts_not_judged": int((~judged).sum()),
        "reference_mean_score": float(reference.mean()),
        "policies": {name: item.model_dump(mode="json") for name, item in metrics.items()},
    }


def judge(
    annotator: Annotator, prompts: Sequence[Prompt], answers: Sequence[str], work: str
) -> NDArray[np.float64]:
    """The annotator's score of each answer, shape (prompts,); NaN where it cannot be scored.

    Args:
        work: what is judged, for the user.
    """
    items = [
        ScoreItem(prompt=prompt, response=answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    parts = [
        _scores(annotator, some)
        for some in chunks(items, _JUDGED_AT_ONCE, work=work, unit="answers")
    ]
    return np.concatenate(parts)


def _scores(annotator: Annotator, items: Sequence[ScoreItem]) -> NDArray[np.float64]:
    encoded = annotator.encode_texts(items, "prompt_left")
    scorable = {at: item for at, item in enumerate(encoded) if not isinstance(item, ItemError)}
    scores = np.full(len(items), np.nan)
    scores[[*scorable]] = annotator.score_texts([*scorable.values()]).values
    return scores


def _metrics(
    rewards: NDArray[np.float64], scores: NDArray[np.float64], reference: NDArray[np.float64]
) -> PolicyMetrics:
    margins = rewards[:, 0] - rewards[:, 1]
    wins = np.where(scores == reference, 0.5, scores > reference)
    thirds = [part for part in np.array_split(wins, _THIRDS) if part.size]
    return PolicyMetrics(
        preference_accuracy=float(np.where(margins == 0, 0.5, margins > 0).mean()),
        implicit_margin=float(margins.mean()),
        win_share=float(wins.mean()),
        win_share_thirds=[float(part.mean()) for part in thirds],
        mean_score=float(scores.mean()),
    )


def _first_prompts(pairs: Sequence[LabelledPair], count: int) -> list[Prompt]:
    distinct = {prompt_key(pair.prompt): pair.prompt for pair in pairs}
    return [*distinct.values()][:count]


def _write_samples(path: Path, prompts: Sequence[Prompt], answers: Answers, scores: Scores) -> None:
    with path.open("wb") as sink:
        JsonlWriter(sink).write(
            {
                "prompt": plain_prompt(prompt),
                "answers": {
                    name: {"answer": texts[at], "score": _number(scores[name][at])}
                    for name, texts in answers.items()
                },
            }
            for at, prompt in enumerate(prompts)
        )


def _number(score: float) -> float | None:
    """The score as JSON has it, which knows no NaN."""
    return None if np.isnan(score) else float(score)
