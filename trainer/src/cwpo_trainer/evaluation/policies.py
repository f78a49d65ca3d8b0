"""`cwpo evaluate policy`: models answer the same prompts, and a judge scores the answers."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cwpo.datasets.triplets import by_reason
from cwpo.datasets.weighted import JsonlWriter, plain_prompt
from cwpo.errors import ConfigError, DatasetError
from cwpo.types import Prompt
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.data.labelled import LabelledPair, prompt_key
from cwpo_trainer.data.prompts import drawn_prompts, read_prompts_and_pairs
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.evaluation.comparison import REFERENCE, Observed, compare
from cwpo_trainer.evaluation.independence import check_independence
from cwpo_trainer.evaluation.judging import Judgement, judge, unreadable
from cwpo_trainer.evaluation.llm_judge import LlmJudge, llm_judge
from cwpo_trainer.evaluation.metrics import LlmJudgement, PolicyMetrics
from cwpo_trainer.evaluation.policy_verdict import verdict
from cwpo_trainer.evaluation.preferences import pair_log_probs, response_log_probs
from cwpo_trainer.outcome import Outcome
from cwpo_trainer.policy.sampling import LoadedPolicy, SampledAnswer, Sampling, free_memory
from cwpo_trainer.policy.vllm_policy import Vllm, VllmPolicy, sampler_of, vllm_for
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import (
    ADAPTER_FOLDER,
    LLM_JUDGE_NAME,
    SAMPLES_NAME,
    RunFolder,
    check_output,
    new_run_folder,
)
from cwpo_trainer.settings.evaluation import PolicyEvaluation

# Of the prompts: the same ones whatever the seed of sampling.
_SEED = 0


@dataclass(slots=True)
class Written:
    """What one model wrote to the prompts, and how likely it holds that and labelled responses.

    preferences: log-probabilities of chosen and rejected responses, shape (pairs, 2).
    log_probs: of its own answers, shape (prompts,); by_reference: the same by the reference, None
        for the reference itself and for a model with other tokens.
    """

    answers: Sequence[SampledAnswer]
    preferences: NDArray[np.float64]
    log_probs: NDArray[np.float64]
    tokenizer: PreTrainedTokenizerBase
    by_reference: NDArray[np.float64] | None = None


def evaluate_policies(settings: PolicyEvaluation) -> Outcome:
    """Measure each policy, and write the output folder.

    Raises: DatasetError, CheckpointError or ConfigError, before any model is loaded.
    """
    check_output(settings.output, resume=False)
    vllm = vllm_for(settings)
    models, baseline = _models(settings)
    unused = UnusedRows(settings.max_rejected_share)
    prompts, pairs = read_prompts_and_pairs(settings.data, unused)
    prompts = drawn_prompts(prompts, settings.prompts, seed=_SEED)
    for path in models.values():
        resolve(path)
    independence = check_independence(
        settings.judge, models, settings.data, allowed=settings.allow_annotator_as_judge
    )
    chosen = _chosen(settings, pairs)
    kept = settings.output.with_name(f".{settings.output.name}.{LLM_JUDGE_NAME}")
    recorded = settings.model_dump(mode="json", exclude={"json_"}) | {"sampler": sampler_of(vllm)}
    with (
        llm_judge(settings, kept) as llm,
        new_run_folder("evaluate-policy", settings.output, recorded) as output,
    ):
        unused.report(output)
        process.prepare(seed=settings.seed, threads=settings.threads)
        annotator = _load_judge(settings.judge, output)
        output.results |= {"independence": independence.model_dump()}
        prompts, left_out = _readable(annotator, prompts)
        written = _written(settings, vllm, models, prompts, pairs)
        free_memory()
        observed = _observed(annotator, prompts, written)
        metrics, results = compare(observed, left_out, beta=settings.beta, baseline=baseline)
        output.results |= results
        by_llm = None
        if llm is not None:
            by_llm = _judged_by_llm(llm, prompts, observed, chosen, baseline)
            output.results["llm_judge"] = by_llm.model_dump(mode="json")
            shutil.copy(kept, output.path / LLM_JUDGE_NAME)
        sentences = verdict(metrics, independence, by_llm)
        output.results["verdict"] = [*sentences]
        _write_samples(output.path / SAMPLES_NAME, prompts, observed)
    kept.unlink(missing_ok=True)
    return Outcome("\n".join([*_summary(metrics, results), *sentences]), output.results)


def named_models(paths: Sequence[str]) -> dict[str, str]:
    """The policies by the name of their folder, an adapter beside a merged model by that of both.

    Raises: ConfigError for two of one name.
    """
    named = {}
    for path in paths:
        *above, name = path.rstrip("/").split("/")
        named["/".join([*above[-1:], name]) if name == ADAPTER_FOLDER else name] = path
    if len(named) != len(paths) or REFERENCE in named:
        raise ConfigError(
            f"the folders of policies and baseline need different names, other than {REFERENCE!r}"
        )
    return named


def _models(settings: PolicyEvaluation) -> tuple[dict[str, str], str]:
    """All models by name, the reference last, and the name of the baseline."""
    paths = [*settings.policy]
    is_reference = settings.baseline in (None, settings.reference)
    if settings.baseline is not None and not is_reference and settings.baseline not in paths:
        paths.append(settings.baseline)
    models = named_models(paths)
    names = {path: name for name, path in models.items()}
    baseline = REFERENCE if is_reference else names[str(settings.baseline)]
    return {**models, REFERENCE: settings.reference}, baseline


def _chosen(settings: PolicyEvaluation, pairs: Sequence[LabelledPair]) -> dict[str, str] | None:
    """By prompt, what the LLM judge compares answers with; None if that is the baseline's.

    Raises: ConfigError where DATA has none.
    """
    if settings.llm_judge is None or settings.llm_judge_against == "baseline":
        return None
    if not pairs:
        raise ConfigError(
            f"--llm-judge-against chosen: {settings.data} has no labelled pairs: name --baseline "
            "and --llm-judge-against baseline"
        )
    return {prompt_key(pair.prompt): pair.chosen for pair in reversed(pairs)}


def _judged_by_llm(
    llm: LlmJudge,
    prompts: Sequence[Prompt],
    observed: Mapping[str, Observed],
    chosen: Mapping[str, str] | None,
    baseline: str,
) -> LlmJudgement:
    """Of all policies but the reference, and but the baseline where they are compared with it."""
    others: Sequence[str] = observed[baseline].texts
    if chosen is not None:
        others = [chosen[prompt_key(prompt)] for prompt in prompts]
    left_out = {REFERENCE} | ({baseline} if chosen is None else set())
    return llm.judgement(
        prompts,
        {name: each.texts for name, each in observed.items() if name not in left_out},
        others,
        against="chosen" if chosen is not None else baseline,
        baseline=baseline,
    )


def _load_judge(path: str, output: RunFolder) -> Annotator:
    annotator = Annotator.load(path)
    annotator.check_scores_single()
    output.results["judge"] = {
        **annotator.model.model_dump(mode="json"),
        "reads": annotator.encoder.reads,
    }
    print(f"judge {annotator.model.name} reads: {annotator.encoder.reads}", file=sys.stderr)
    return annotator


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


def _written(
    settings: PolicyEvaluation,
    vllm: Vllm | None,
    models: Mapping[str, str],
    prompts: Sequence[Prompt],
    pairs: Sequence[LabelledPair],
) -> dict[str, Written]:
    """What each model wrote. No two models are loaded at a time."""
    sampled = {}
    if vllm is not None:
        for name, path in models.items():
            policy = VllmPolicy(path, settings.dtype, vllm)
            sampled[name] = policy.answers(prompts, _sampling(settings), _answers_of(name))
    written = {}
    for name, path in models.items():
        if name != REFERENCE:
            written[name] = _written_with(
                *(LoadedPolicy(path, settings.dtype), name, settings),
                *(sampled.get(name), prompts, pairs),
            )
            free_memory()
    reference = LoadedPolicy(models[REFERENCE], settings.dtype)
    tokens = reference.tokenizer.get_vocab()
    for name, each in written.items():
        if each.tokenizer.get_vocab() == tokens:
            work = f"{REFERENCE} reads answers of {name}"
            each.by_reference = _of_answers(reference, each.answers, settings.batch_size, work)
    written[REFERENCE] = _written_with(
        reference, REFERENCE, settings, sampled.get(REFERENCE), prompts, pairs
    )
    return written


def _written_with(
    policy: LoadedPolicy,
    name: str,
    settings: PolicyEvaluation,
    answers: Sequence[SampledAnswer] | None,
    prompts: Sequence[Prompt],
    pairs: Sequence[LabelledPair],
) -> Written:
    """What one model wrote; without answers, it writes them first."""
    size = settings.batch_size
    preferences = np.empty((0, 2))
    if pairs:
        preferences = pair_log_probs(policy, pairs, size, f"log-probabilities of {name}")
    if answers is None:
        answers = policy.answers(prompts, _sampling(settings), _answers_of(name))
    log_probs = _of_answers(policy, answers, size, f"{name} reads its answers")
    return Written(answers, preferences, log_probs, policy.tokenizer)


def _sampling(settings: PolicyEvaluation) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        token_budget=settings.token_budget,
        seed=settings.seed,
    )


def _answers_of(name: str) -> str:
    return f"answers of {name}"


def _of_answers(
    policy: LoadedPolicy, answers: Sequence[SampledAnswer], batch_size: int, work: str
) -> NDArray[np.float64]:
    """Log-probabilities of answers, shape (answers,)."""
    return response_log_probs(policy, [answer.tokens for answer in answers], batch_size, work)


def _observed(
    annotator: Annotator, prompts: Sequence[Prompt], written: Mapping[str, Written]
) -> dict[str, Observed]:
    """With what the judge makes of the answers; all are measured in tokens of the reference."""
    tokenizer: Any = written[REFERENCE].tokenizer
    observed = {}
    for name, each in written.items():
        texts = [answer.text for answer in each.answers]
        tokens = np.array([len(answer.tokens.response_ids) for answer in each.answers])
        ratios = None if each.by_reference is None else each.log_probs - each.by_reference
        observed[name] = Observed(
            judged=judge(annotator, prompts, texts, f"judge {name}"),
            preferences=each.preferences,
            texts=texts,
            lengths=np.array([*map(len, tokenizer(texts, add_special_tokens=False).input_ids)]),
            ended=np.array([answer.has_ended for answer in each.answers]),
            log_ratios=None if ratios is None else (ratios, tokens),
        )
    return observed


def _write_samples(path: Path, prompts: Sequence[Prompt], observed: Mapping[str, Observed]) -> None:
    with path.open("wb") as sink:
        JsonlWriter(sink).write(
            {
                "prompt": plain_prompt(prompt),
                "answers": {
                    name: {
                        "answer": each.texts[at],
                        "tokens": int(each.lengths[at]),
                        **_score(each.judged, at),
                    }
                    for name, each in observed.items()
                },
            }
            for at, prompt in enumerate(prompts)
        )


def _score(judged: Judgement, at: int) -> dict[str, float | str | None]:
    """The score of an answer, or None and the reason: JSON knows no NaN."""
    problem = judged.unscored.get(at) or judged.failures.get(at)
    if problem is None:
        return {"score": float(judged.scores[at])}
    return {"score": None, "problem": problem}


def _summary(metrics: Mapping[str, PolicyMetrics], results: Mapping[str, Any]) -> Iterator[str]:
    if results["prompts_left_out"]:
        reasons = by_reason(Counter(results["prompts_left_out"]))
        print(f"prompts that could not be judged, left out for all: {reasons}", file=sys.stderr)
    for name, item in metrics.items():
        lost = f", where it loses by answers without a score: {by_reason(Counter(item.unscored))}"
        preferred = (
            ""
            if item.preference_accuracy is None
            else f"preference accuracy {item.preference_accuracy:.1%}, "
        )
        yield (
            f"{name}: {preferred}"
            f"scores above the reference on {item.win_share:.1%} of {results['prompts']:,} prompts"
            f"{lost if item.unscored else ''}"
        )
