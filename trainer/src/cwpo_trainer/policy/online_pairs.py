"""The pairs of one training step: the policy answers, and the annotator labels (App. J.5)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.client import Client
from cwpo.datasets.weighted import weighted_row
from cwpo.types import Annotation, ItemError, Prompt, Triplet
from cwpo_trainer.data.weighted import WeightedPair
from cwpo_trainer.policy.alignment import EPSILON_COLUMN, PAIRS, WEIGHT_COLUMN
from cwpo_trainer.policy.answers import AS_SAMPLED, ComparedAnswers, best_and_worst
from cwpo_trainer.policy.sampling import AnsweringPolicy, Sampling, distinct_answers
from cwpo_trainer.run import process
from cwpo_trainer.settings.online_alignment import OnlineAlignment
from cwpo_trainer.settings.policy_training import Alignment
from cwpo_trainer.soft_labels import SOFT_LABELS, epsilons
from cwpo_trainer.weights import WEIGHTS


@dataclass(frozen=True, slots=True)
class OnlinePair:
    """What became of one prompt.

    example: the pair as the trainer's collator reads it. Where there is no label, because the
        answers were alike, tied or refused, its weight is 0, as that of a pair with C = 0 in eq. 7.
    row: the annotated pair as a row of a weighted dataset; None if it was not annotated.
    """

    example: dict[str, Any]
    row: dict[str, Any] | None


class OnlinePairs:
    """Makes a pair of each prompt, with the policy as it is at that moment.

    Args:
        prompts: all that may be asked for, by their indices.
        revision: that the annotator must have.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        settings: OnlineAlignment,
        alignment: Alignment,
        client: Client,
        revision: str,
    ) -> None:
        self._prompts = prompts
        self._settings = settings
        self._alignment = alignment
        self._client = client
        self._revision = revision
        self._told: set[str] = set()

    def made(self, policy: AnsweringPolicy, indices: Sequence[int], step: int) -> list[OnlinePair]:
        """The pairs of these prompts, in order.

        They depend on the policy's weights, the seed, the step and the rank of this process alone,
        so that a resumed run makes the same ones. Raises: APIError, ConnectionFailedError.
        """
        prompts = [self._prompts[index] for index in indices]
        answers = self._answers(policy, prompts, step)
        triplets = {
            at: Triplet(
                id=f"{step}-{indices[at] + 1}",
                prompt=prompts[at],
                response_a=two.compared[0],
                response_b=two.compared[1],
            )
            for at, two in enumerate(answers)
            if len(two.compared) >= 2
        }
        annotations = self._annotations(triplets, step)
        examples = self._examples(policy, prompts, answers, annotations)
        pairs = [OnlinePair(example, None) for example in examples]
        for at, annotation in annotations.items():
            sampled = answers[at].confidence
            extra = {"step": step} | ({} if sampled is None else {AS_SAMPLED: sampled})
            pairs[at] = OnlinePair(examples[at], weighted_row(triplets[at], annotation, extra))
        return pairs

    def _answers(
        self, policy: AnsweringPolicy, prompts: Sequence[Prompt], step: int
    ) -> list[ComparedAnswers]:
        settings = self._settings
        seeds = np.random.SeedSequence((settings.seed, step, process.rank()))
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            batch_size=settings.batch_size,
            seed=int(seeds.generate_state(1)[0]),
        )
        sampled = distinct_answers(policy, prompts, settings.responses, sampling, work=None)
        if settings.responses > 2:
            how = (self._client, settings.truncation, self._revision)
            return best_and_worst(prompts, sampled, *how)
        return [ComparedAnswers(each) for each in sampled]

    def _annotations(self, triplets: Mapping[int, Triplet], step: int) -> dict[int, Annotation]:
        """Of those that the annotator did not refuse, by the same keys."""
        if not triplets:
            return {}
        answer = self._client.annotate(
            [*triplets.values()], truncation=self._settings.truncation, revision=self._revision
        )
        annotations = {}
        for at, label in zip(triplets, answer.annotations, strict=True):
            if isinstance(label, Annotation):
                annotations[at] = label
            else:
                self._tell(label.error, step)
        return annotations

    def _tell(self, refusal: ItemError, step: int) -> None:
        """Tell the user why the annotator refuses a pair, once for each reason."""
        if process.is_main() and refusal.code not in self._told:
            self._told.add(refusal.code)
            print(
                f"step {step}: the annotator refuses a pair, as {refusal.code}: {refusal.detail}; "
                "others of this reason are only counted, as not annotated",
                file=sys.stderr,
            )

    def _examples(
        self,
        policy: AnsweringPolicy,
        prompts: Sequence[Prompt],
        answers: Sequence[ComparedAnswers],
        annotations: Mapping[int, Annotation],
    ) -> list[dict[str, Any]]:
        of_prompts = [annotations.get(at) for at in range(len(prompts))]
        pairs = [
            WeightedPair(str(at), prompt, *_in_order(two.compared, label), self._confidence(label))
            for at, (prompt, two, label) in enumerate(
                zip(prompts, answers, of_prompts, strict=True)
            )
        ]
        is_labelled = [label is not None and label.preferred != "tie" for label in of_prompts]
        confidences = np.array([pair.confidence for pair in pairs], dtype=np.float32)
        numbers = {WEIGHT_COLUMN: self._weights(confidences) * np.array(is_labelled)}
        soft = SOFT_LABELS.get(self._alignment.confidence_as)
        if soft is not None:
            numbers[EPSILON_COLUMN] = epsilons(confidences, most=soft.most)
        return [
            row | {name: float(values[at]) for name, values in numbers.items()}
            for at, row in enumerate(PAIRS.rows(policy.formatter, pairs))
        ]

    def _confidence(self, label: Annotation | None) -> float:
        if label is None:
            return 0.0
        calibrated = label.calibrated_confidence if self._alignment.calibrated else None
        return label.confidence if calibrated is None else calibrated

    def _weights(self, confidences: NDArray[np.float32]) -> NDArray[np.float32]:
        weight = WEIGHTS[self._alignment.weight]
        constants = {
            each.argument: getattr(self._alignment, each.flag) for each in weight.constants
        }
        # Weights that are all 0 would be an error in a dataset; a step may have none other.
        with_a_sure_one = np.append(confidences, np.float32(1))
        return weight.function(with_a_sure_one, **constants)[:-1]


def _in_order(answers: Sequence[str], label: Annotation | None) -> tuple[str, str]:
    """The chosen and the rejected answer; without a label any two texts, which have no weight."""
    first, *others = answers or [""]
    second = others[0] if others else first
    return (second, first) if label is not None and label.preferred == "b" else (first, second)
