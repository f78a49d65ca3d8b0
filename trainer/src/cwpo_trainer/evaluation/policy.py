"""What alignment did to a policy: preference accuracy, and sampled answers judged by an annotator.

GRA-like share: the share of prompts on which the annotator scores the aligned policy's answer above
the reference's. In the paper a gold reward model is the judge; any annotator folder can be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo.errors import ConfigError, DatasetError
from cwpo.types import ItemError, Prompt, ScoreItem
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer import runtime
from cwpo_trainer.data import LabelledPair, prompt_key, read_pairs
from cwpo_trainer.evaluation.metrics import PolicyMetrics
from cwpo_trainer.formatting import TokenisedText
from cwpo_trainer.record import SAMPLES_NAME, new_output
from cwpo_trainer.sampling import LoadedPolicy, Sampling, chunks

if TYPE_CHECKING:
    from cwpo_trainer.commands import EvaluatePolicy

REFERENCE = "reference"
_THIRDS = 3


def run(settings: EvaluatePolicy) -> None:
    """Measure each policy against the reference and write the output folder."""
    paths = named_paths(settings.policy)
    pairs = read_pairs(settings.data)
    prompts = _first_prompts(pairs, settings.prompts)
    for path in (settings.reference, *paths.values()):
        resolve(path)
    recorded = settings.model_dump(mode="json")
    with new_output("evaluate-policy", settings.output, recorded) as output:
        runtime.prepare(seed=settings.seed, threads=settings.threads)
        annotator = Annotator.load(settings.annotator)
        annotator.check_scores_single()
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        rewards: dict[str, NDArray[np.float64]] = {}
        answers: dict[str, list[str]] = {}
        for name, path in {REFERENCE: settings.reference, **paths}.items():
            one = LoadedPolicy(path, settings.dtype)
            rewards[name] = response_log_probs(one, pairs, settings)
            answers[name] = one.sample(prompts, sampling, f"answers of {name}")
        scores = judge(annotator, prompts, answers)
        judged = np.isfinite(np.stack([*scores.values()])).all(axis=0)
        if not judged.any():
            raise DatasetError("no prompt got an answer from every policy that could be scored")
        metrics = {
            name: _metrics(
                settings.beta * (rewards[name] - rewards[REFERENCE]),
                scores[name][judged],
                scores[REFERENCE][judged],
            )
            for name in paths
        }
        output.results |= {
            "pairs": len(pairs),
            "prompts": int(judged.sum()),
            "prompts_not_judged": int((~judged).sum()),
            "reference_mean_score": float(scores[REFERENCE][judged].mean()),
            "policies": {name: item.model_dump(mode="json") for name, item in metrics.items()},
        }
        _write_samples(output.folder / SAMPLES_NAME, prompts, answers, scores)
    for name, item in metrics.items():
        print(
            f"{name}: preference accuracy {item.preference_accuracy:.1%}, "
            f"scores above the reference on {item.win_share:.1%} of {int(judged.sum()):,} prompts"
        )


def named_paths(paths: Sequence[str]) -> dict[str, str]:
    """The policies by the name of their folder. Raises: ConfigError for two of one name."""
    named = {path.rstrip("/").split("/")[-1]: path for path in paths}
    if len(named) != len(paths) or REFERENCE in named:
        raise ConfigError(
            f"--policy: each needs a folder name of its own, other than {REFERENCE!r}"
        )
    return named


@torch.inference_mode()
def response_log_probs(
    one: LoadedPolicy, pairs: Sequence[LabelledPair], settings: EvaluatePolicy
) -> NDArray[np.float64]:
    """Summed log-probabilities of chosen and rejected responses, shape (pairs, 2)."""
    prompts = [pair.prompt for pair in pairs]
    texts = one.formatter.tokenise(
        [*prompts, *prompts], [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
    )
    result = np.empty(len(texts))
    order = sorted(range(len(texts)), key=lambda at: texts[at].tokens, reverse=True)
    for rows in chunks(order, settings.batch_size, "log-probabilities"):
        result[rows] = _log_probs(one, [texts[row] for row in rows])
    return result.reshape(2, -1).T


def judge(
    annotator: Annotator, prompts: Sequence[Prompt], answers: dict[str, list[str]]
) -> dict[str, NDArray[np.float64]]:
    """The annotator's score of each answer, shape (prompts,); NaN where it cannot be scored."""
    scores = {}
    for name, texts in answers.items():
        items = [
            ScoreItem(prompt=prompt, response=text)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        encoded = annotator.encode_texts(items, "prompt_left")
        good = {at: item for at, item in enumerate(encoded) if not isinstance(item, ItemError)}
        of_policy = np.full(len(items), np.nan)
        of_policy[[*good]] = annotator.score_texts([*good.values()])
        scores[name] = of_policy
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


def _log_probs(one: LoadedPolicy, texts: Sequence[TokenisedText]) -> NDArray[np.float64]:
    """Summed log-probability of each response, shape (texts,)."""
    width = max(text.tokens for text in texts)
    ids = torch.full((len(texts), width), one.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    is_response = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : text.tokens] = torch.as_tensor(text.prompt_ids + text.response_ids)
        mask[row, : text.tokens] = 1
        is_response[row, len(text.prompt_ids) : text.tokens] = True
    ids, is_response = ids.to(one.model.device), is_response.to(one.model.device)
    logits = one.model(input_ids=ids, attention_mask=mask.to(one.model.device)).logits[:, :-1]
    log_probs = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return np.asarray((log_probs * is_response[:, 1:]).sum(1).double().cpu())


def _first_prompts(pairs: Sequence[LabelledPair], count: int) -> list[Prompt]:
    distinct = {prompt_key(pair.prompt): pair.prompt for pair in pairs}
    return [*distinct.values()][:count]


def _write_samples(
    path: Any,
    prompts: Sequence[Prompt],
    answers: dict[str, list[str]],
    scores: dict[str, NDArray[np.float64]],
) -> None:
    with path.open("w") as sink:
        for at, prompt in enumerate(prompts):
            of_policies = {
                name: {
                    "answer": texts[at],
                    "score": None if np.isnan(scores[name][at]) else float(scores[name][at]),
                }
                for name, texts in answers.items()
            }
            text = prompt if isinstance(prompt, str) else [turn.model_dump() for turn in prompt]
            sink.write(json.dumps({"prompt": text, "answers": of_policies}) + "\n")
