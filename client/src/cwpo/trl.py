"""What TRL's trainers take: datasets of annotated pairs, a reward function, a pairwise judge.

TRL is not imported here: it accepts any callable, and any object with the right methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cwpo.client import Client
from cwpo.datasets.naming import TRIPLETS, named
from cwpo.datasets.records import Rows, records
from cwpo.datasets.triplets import RejectedRow, parse_triplet
from cwpo.datasets.weighted import weighted_row
from cwpo.errors import ConfigError, CwpoError, DatasetError
from cwpo.types import (
    AnnotateResponse,
    Annotation,
    FailedAnnotation,
    FailedScore,
    Message,
    Prompt,
    ScoreItem,
    Triplet,
    Truncation,
)

# What TRL hands over: a string, or the messages of a conversation.
Text = str | Sequence[Mapping[str, Any]]


def to_trl(
    triplets: Rows,
    labels: AnnotateResponse | Iterable[Annotation | FailedAnnotation],
    *,
    columns: Mapping[str, str] | None = None,
) -> Any:
    """The weighted dataset of triplets and their labels, as a `datasets.Dataset`.

    It has the columns that TRL's preference trainers and ConfidenceDPOTrainer read: prompt, chosen,
    rejected, confidence and the scores. Triplets without a label are left out.

    Args:
        triplets: as they were given to `client.annotate`.
        columns: as they were given to `client.annotate`.
        labels: its answer, or what `client.annotate_iter` yields.
    Raises: ConfigError if the package `datasets` is not installed; DatasetError if no triplet has a
        label; ValueError for other numbers of triplets and labels.

    Example: to_trl(rows, client.annotate(rows))
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ConfigError("to_trl needs datasets: pip install 'cwpo[datasets]'") from error
    told = labels.annotations if isinstance(labels, AnnotateResponse) else labels
    numbered = named(enumerate(records(triplets)), TRIPLETS, columns)
    rows = []
    for (place, record), label in zip(numbered, told, strict=True):
        if isinstance(label, Annotation):
            rows.append(weighted_row(_triplet(place, record), label))
    if not rows:
        raise DatasetError("no triplet has a label")
    return Dataset.from_list(rows)


def reward_function(
    client: Client, *, truncation: Truncation = "prompt_left"
) -> Callable[..., list[float | None]]:
    """A reward function for `reward_funcs=` of GRPOTrainer, RLOOTrainer or OnlineDPOTrainer.

    The reward of a completion is the annotator's raw score (logit). A completion that cannot be
    scored, such as an empty one, gets None, which TRL ignores. The function raises CwpoError if the
    service does not answer, instead of training on missing rewards.

    Example: GRPOTrainer(model, reward_funcs=reward_function(Client()), train_dataset=prompts)
    """

    def annotator_reward(
        prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float | None]:
        items = [
            ScoreItem(prompt=_prompt(prompt), response=_response(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return [
            None if isinstance(score, FailedScore) else score.score
            for score in client.score(items, truncation=truncation).scores
        ]

    return annotator_reward


class PairwiseJudge:
    """A judge with the interface of TRL's former pairwise judges.

    Args:
        client: client of the service whose annotator compares the completions.
    """

    def __init__(self, client: Client, *, truncation: Truncation = "prompt_left") -> None:
        self._client = client
        self._truncation: Truncation = truncation

    def judge(self, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]) -> list[int]:
        """Which of the two completions of each prompt is better.

        There is no `shuffle_order`: the label does not depend on the order of the completions.

        Args:
            completions: two for each prompt.
        Returns: 0 or 1 for each prompt; -1 for a tie, and where a completion cannot be judged.
        Raises: CwpoError for another number of completions, or a service that does not answer.
        """
        triplets = []
        for index, (prompt, pair) in enumerate(zip(prompts, completions, strict=True)):
            if len(pair) != 2:
                raise CwpoError(
                    f"completions[{index}] holds {len(pair)} completions: a judge compares two"
                )
            a, b = map(_response, pair)
            triplets.append(Triplet(prompt=_prompt(prompt), response_a=a, response_b=b))
        answer = self._client.annotate(triplets, truncation=self._truncation)
        return [
            -1
            if isinstance(label, FailedAnnotation)
            else {"a": 0, "b": 1, "tie": -1}[label.preferred]
            for label in answer.annotations
        ]


def _triplet(place: int, record: Any) -> Triplet:
    """Raises: DatasetError for a row that is no triplet, and so cannot have a label."""
    row = record if isinstance(record, Triplet) else parse_triplet(place, record)
    if isinstance(row, RejectedRow):
        raise DatasetError(f"row {place} has a label, and is no triplet: {row.error.detail}")
    return row if isinstance(row, Triplet) else row.triplet


def _prompt(text: Text) -> Prompt:
    if isinstance(text, str):
        return text
    return [Message(role=turn["role"], content=turn["content"]) for turn in text]


def _response(text: Text) -> str:
    """Raises: CwpoError for a completion of several turns, as those with tool calls are."""
    if isinstance(text, str):
        return text
    if len(text) != 1:
        raise CwpoError(f"a completion of {len(text)} messages: only a single answer can be scored")
    return str(text[0]["content"])
