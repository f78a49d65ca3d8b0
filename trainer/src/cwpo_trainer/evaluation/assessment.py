"""`cwpo evaluate annotator`: agreement with human labels, and which labels can be trusted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cwpo.datasets.weighted import JsonlWriter, plain_prompt
from cwpo.errors import DatasetError
from cwpo.reviews.forms import write_pairs
from cwpo.reviews.pairs import ReviewPair
from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import Card, keep_certificate, read_card, resolve
from cwpo_annotator.encoding.encoder import Encoder
from cwpo_trainer.data.conversations import one_of_each
from cwpo_trainer.data.labelled import LabelledPair, fingerprint, read_pairs, read_unlabelled
from cwpo_trainer.data.labelled_prompts import check_unseen, labelled_prompts
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.evaluation.agreement import JudgedPairs, judge_pairs, measured
from cwpo_trainer.evaluation.bias import accuracy_by_source, length_bias, position_bias
from cwpo_trainer.evaluation.certificate import certify, labels_needed
from cwpo_trainer.evaluation.embeddings import embedded, embedding_shift
from cwpo_trainer.evaluation.metrics import Assessment
from cwpo_trainer.evaluation.shift import ScoredTriplets, shift
from cwpo_trainer.evaluation.verdict import verdict
from cwpo_trainer.outcome import Outcome
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import (
    MISTAKES_NAME,
    TO_LABEL_NAME,
    RunFolder,
    check_output,
    new_run_folder,
)
from cwpo_trainer.settings.evaluation import AnnotatorEvaluation

# Always the same pair of a conversation: nobody may look for one that is certified.
_SEED = 0
_MISTAKES = 20


def evaluate_annotator(settings: AnnotatorEvaluation) -> Outcome:
    """Measure the annotator on labelled pairs, and write the output folder.

    With `certify`, annotator.json keeps the certificate that was found.
    Raises: DatasetError or CheckpointError, before any scoring.
    """
    if settings.output is not None:
        check_output(settings.output, resume=False)
    unused, unused_others = (UnusedRows(settings.max_rejected_share) for _ in range(2))
    pairs = read_pairs(settings.data, unused)
    others = None
    if settings.compare_with is not None:
        others = read_unlabelled(settings.compare_with, unused_others)
    folder = resolve(settings.annotator)
    unseen = _check_unseen(folder, pairs, settings.data)
    if settings.output is None:
        unused.tell(are_listed=False)
        unused_others.tell(are_listed=False)
        return _evaluate(settings, folder, pairs, others, unseen=unseen, output=None)
    recorded = settings.model_dump(mode="json", exclude={"json_"})
    with new_run_folder("evaluate-annotator", settings.output, recorded) as output:
        unused.report(output)
        if others:
            unused_others.report(output, "other")
        return _evaluate(settings, folder, pairs, others, unseen=unseen, output=output)


def _evaluate(
    settings: AnnotatorEvaluation,
    folder: Path,
    pairs: Sequence[LabelledPair],
    others: Sequence[Triplet] | None,
    *,
    unseen: bool,
    output: RunFolder | None,
) -> Outcome:
    process.prepare(seed=_SEED, threads=settings.threads)
    annotator = Annotator.load(settings.annotator, dtype=settings.dtype)
    judged = judge_pairs(annotator, pairs)
    metrics = measured(judged)
    scored = None
    if others and settings.compare_with is not None:
        scored = ScoredTriplets.of(annotator, others, settings.compare_with, seed=_SEED)
    found = _assess(settings, annotator, judged, scored, unseen=unseen)
    found.verdict = verdict(metrics, found)
    results = {**metrics.model_dump(mode="json"), **found.model_dump(mode="json")}
    if output is not None:
        output.results |= results
        _write_mistakes(output.path / MISTAKES_NAME, judged)
        if scored is not None and settings.suggest is not None:
            _write_to_label(
                output.path / TO_LABEL_NAME, scored.to_label(settings.suggest, annotator)
            )
    told = [metrics.summary, *found.verdict]
    if settings.certify and found.certificate is not None:
        card = read_card(folder) or Card(encoding=Encoder.load(folder).spec)
        keep_certificate(folder, card, found.certificate)
        told.append(f"The certificate is in {folder / 'annotator.json'}.")
    return Outcome("\n".join(told), results)


def _check_unseen(folder: Path, pairs: Sequence[LabelledPair], source: str) -> bool:
    """Whether the annotator tells what it was trained on; then none of it is among the pairs.

    Raises: DatasetError where some are.
    """
    seen = labelled_prompts(folder)
    if seen is not None:
        check_unseen(pairs, seen, source)
        return True
    card = read_card(folder)
    if card is not None and card.data_fingerprint == fingerprint(pairs):
        raise DatasetError(
            f"{source}: the annotator was trained on these very pairs: measure it on others"
        )
    return False


def _assess(
    settings: AnnotatorEvaluation,
    annotator: Annotator,
    judged: JudgedPairs,
    others: ScoredTriplets | None,
    *,
    unseen: bool,
) -> Assessment:
    """All but the verdict. Certified, and compared, is one pair of each conversation."""
    places = one_of_each([pair.prompt for pair in judged.pairs], seed=_SEED)
    confidences, correct = judged.confidences[places], judged.margins[places] > 0
    promise = {"max_error": settings.max_error, "delta": settings.delta}
    certificate = certify(confidences, correct, **promise)
    if certificate is not None:
        certificate.data_fingerprint = fingerprint(judged.pairs)
    moved = None
    if others is not None:
        moved = shift(
            confidences,
            others,
            threshold=None if certificate is None else certificate.threshold,
            embeddings=embedding_shift(
                embedded(annotator, [judged.pairs[at].triplet for at in places]),
                embedded(annotator, others.triplets),
            ),
        )
    return Assessment(
        **promise,
        unseen=unseen,
        certificate=certificate,
        labels_needed=labels_needed(confidences, correct, **promise),
        length_bias=length_bias(judged),
        position_bias=position_bias(judged),
        sources=accuracy_by_source(judged),
        shift=moved,
        verdict=[],
    )


def _write_mistakes(path: Path, judged: JudgedPairs) -> None:
    """The pairs with the surest of the wrong labels, the surest first; no file if none is wrong."""
    wrong = [at for at in judged.order[::-1] if judged.margins[at] < 0][:_MISTAKES]
    if not wrong:
        return
    with path.open("wb") as sink:
        JsonlWriter(sink).write(
            [_mistake(judged.pairs[at], float(judged.confidences[at])) for at in wrong]
        )


def _write_to_label(path: Path, pairs: Sequence[ReviewPair]) -> None:
    with path.open("w", encoding="utf-8", newline="") as sink:
        write_pairs(pairs, "csv", sink)
    print(f"{len(pairs):,} pairs to label next are in {TO_LABEL_NAME}.", file=sys.stderr)


def _mistake(pair: LabelledPair, confidence: float) -> dict[str, Any]:
    return {
        "id": pair.id,
        "prompt": plain_prompt(pair.prompt),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "confidence": confidence,
    }
