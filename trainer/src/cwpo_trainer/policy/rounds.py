"""Online CW-DPO (App. J.5): generate with the policy, annotate, align it, and so on in rounds.

The paper shows that this fails where the annotator does not keep up with the policy, whose answers
grow unlike those that it was trained on. Each round therefore measures the drift of confidence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from cwpo.annotated_file import annotate_file, errors_path
from cwpo.client import Client
from cwpo.datasets.triplets import file_format, read_rows
from cwpo.errors import ConfigError, DatasetError
from cwpo.partial_file import partial_file
from cwpo.types import ModelInfo, Prompt
from cwpo_annotator.checkpoint import resolve
from cwpo_annotator.confidence import drift
from cwpo_trainer.data.prompts import prompts_of_round, read_prompts
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.policy.alignment import align, check
from cwpo_trainer.policy.answers import AS_SAMPLED, ComparedAnswers, best_and_worst
from cwpo_trainer.policy.sampling import Sampling, distinct_answers, free_memory
from cwpo_trainer.policy.vllm_policy import policy_to_ask, sampler_of, vllm_for
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import LOG_NAME, ROUNDS_NAME, read_lines
from cwpo_trainer.run.resumption import check_start, inputs_of, is_started, note_start
from cwpo_trainer.settings.online_alignment import OnlineAlignment
from cwpo_trainer.settings.policy_training import Alignment

# They change nothing of what a round computes; --align does by what the file says.
_WITHOUT_EFFECT = {
    "align",
    "config",
    "resume",
    "rounds",
    "url",
    "api_key",
    "threads",
    "vllm_python",
    "vllm_arguments",
    "drift_limit",
    "drift_window",
    "max_rejected_share",
    "output",
}


class Round:
    """One round's folder: what was generated, annotated and trained. Each appears when whole."""

    def __init__(self, output: Path, number: int) -> None:
        self.number = number
        self.folder = output / f"round-{number}"
        self.triplets = self.folder / "triplets.jsonl"
        self.weighted = self.folder / "weighted.parquet"
        self.policy = self.folder / "policy"

    def write_triplets(
        self, prompts: Sequence[Prompt], of_prompts: Sequence[ComparedAnswers]
    ) -> None:
        """Write the two answers to be compared of each prompt that has two.

        Raises: DatasetError where none has.
        """
        rows = [
            {
                "id": f"{self.number}-{at}",
                "prompt": prompt if isinstance(prompt, str) else [t.model_dump() for t in prompt],
                "response_a": answers.compared[0],
                "response_b": answers.compared[1],
                **({} if answers.confidence is None else {AS_SAMPLED: answers.confidence}),
            }
            for at, (prompt, answers) in enumerate(zip(prompts, of_prompts, strict=True), 1)
            if len(answers.compared) >= 2
        ]
        if not rows:
            raise DatasetError(
                f"round {self.number}: no prompt got two different answers: raise --temperature or "
                "--max-new-tokens"
            )
        self.folder.mkdir(exist_ok=True)
        with partial_file(self.triplets) as sink:
            for row in rows:
                sink.write(json.dumps(row).encode() + b"\n")


def online(settings: OnlineAlignment, alignment: Alignment, client: Client) -> None:
    """Do the rounds that are not done yet.

    Args:
        alignment: of every round; its model, data, output and reference are those of the round.
        client: of the service that annotates; closed in the end.
    Raises: CwpoError, before any model is loaded, for settings, prompts or a service that will not
        do; what a round has made stays, and --resume goes on from there.
    """
    if process.world_size() > 1:
        raise ConfigError(
            "cwpo online runs rounds as one process; under torchrun use --update immediate, or "
            "cwpo_trainer.align on the pairs of a round"
        )
    _check(alignment, settings.align, settings.reference)
    vllm = vllm_for(settings)
    settings = settings.model_copy(update={"sampler": sampler_of(vllm)})
    unused = UnusedRows(settings.max_rejected_share)
    prompts = read_prompts(settings.prompts, unused)
    resolve(settings.model)
    with client:
        annotator = client.model()
        _open(settings.output, _inputs(settings, annotator.revision), resume=settings.resume)
        unused.tell(are_listed=True)
        unused.write(settings.output)
        log = settings.output / ROUNDS_NAME
        start = settings.model
        for number in range(1, settings.rounds + 1):
            this = Round(settings.output, number)
            asked = prompts_of_round(prompts, number, settings.prompts_per_round, settings.seed)
            if not this.triplets.exists():
                process.prepare(seed=settings.seed, threads=settings.threads)
                sampling = Sampling(
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    batch_size=settings.batch_size,
                    seed=settings.seed + 1_000_003 * number,
                )
                sampled = distinct_answers(
                    policy_to_ask(start, settings.dtype, vllm),
                    asked,
                    settings.responses,
                    sampling,
                    f"answers of round {number}",
                )
                free_memory()
                answers = [ComparedAnswers(each) for each in sampled]
                if settings.responses > 2:
                    answers = best_and_worst(asked, sampled, client, settings.truncation)
                this.write_triplets(asked, answers)
            if not this.weighted.exists():
                annotated = annotate_file(
                    client, this.triplets, this.weighted, truncation=settings.truncation
                )
                print(annotated.summary(), file=sys.stderr)
            if not this.policy.exists():
                is_start = settings.reference == "round" or start == settings.model
                reference = None if is_start else settings.model
                align(_of_round(alignment, this, start, reference))
            if len(read_lines(log)) < number:
                with log.open("a") as sink:
                    sink.write(json.dumps(_measures(this, len(asked), annotator)) + "\n")
            _warn_of_drift(read_lines(log)[number - 1], settings.drift_limit)
            start = str(this.policy)
    show(read_lines(log))
    print(f"the policy of the last round: {start}")


def _of_round(alignment: Alignment, this: Round, start: str, reference: str | None) -> Alignment:
    """The alignment of this round; without a reference, it is what the round starts from."""
    own = {"model": start, "data": this.weighted, "output": this.policy, "reference": reference}
    return alignment.model_copy(update=own)


def _check(one: Alignment, file: Path | None, reference: Literal["first", "round"]) -> None:
    """Raises: ConfigError for settings of the file of --align that a round has no use for."""
    for name, is_set in (
        ("labels: human", one.labels == "human"),
        ("annotator", one.annotator is not None),
        ("reference", one.reference is not None),
        ("push_to_hub", one.push_to_hub is not None),
        ("dry_run", one.dry_run),
    ):
        if is_set:
            raise ConfigError(f"--align {file}: {name} is not for online rounds")
    if reference == "first" and not one.reads_reference:
        raise ConfigError(f"--reference first: {one.loss} has no reference; say --reference round")
    check(one)


def _inputs(settings: OnlineAlignment, annotator_revision: str) -> dict[str, Any]:
    """What the result depends on."""
    return inputs_of(
        settings.model_dump(mode="json"),
        without_effect=_WITHOUT_EFFECT,
        files={"prompts": settings.prompts},
    ) | {
        "--align": settings.align.read_text() if settings.align else None,
        "annotator": annotator_revision,
    }


def _open(output: Path, inputs: dict[str, Any], *, resume: bool) -> None:
    """Create the output folder, or see that it is this very run that goes on in it."""
    if not is_started(output):
        if output.exists():
            raise ConfigError(f"{output} exists already: choose another --output")
        output.mkdir(parents=True)
        note_start(output, inputs)
    elif resume:
        check_start(output, inputs)
    else:
        raise ConfigError(f"{output} exists already: continue with --resume, or remove it")


def _measures(this: Round, asked: int, annotator: ModelInfo) -> dict[str, Any]:
    """The line of rounds.jsonl.

    Drift is measured on two answers as they were sampled, since held-out pairs were not chosen for
    their scores either: the best and the worst of many differ more, however well they are known.
    """
    with this.weighted.open("rb") as stream:
        rows = [row for _, row in read_rows(stream, file_format(this.weighted))]
    columns = {
        name: np.array([row[name] for row in rows if isinstance(row, dict)], dtype=np.float64)
        for name in ("confidence", "score_chosen", "score_rejected")
    }
    confidences, quantiles = columns["confidence"], annotator.confidence_quantiles
    triplets = read_lines(this.triplets)
    as_sampled = [row[AS_SAMPLED] for row in triplets if AS_SAMPLED in row]
    compared = np.array(as_sampled) if as_sampled else confidences
    steps = [line for line in read_lines(this.policy / LOG_NAME) if "loss" in line]
    return {
        "round": this.number,
        "prompts": asked,
        "pairs": len(rows),
        "without_a_pair": asked - len(triplets),
        "rejected": len(read_lines(errors_path(this.weighted))),
        "mean_confidence": float(confidences.mean()),
        "drift": None if quantiles is None else drift(compared, quantiles),
        "mean_score": float((columns["score_chosen"] + columns["score_rejected"]).mean() / 2),
        "steps": steps[-1]["step"],
        "loss": steps[-1]["loss"],
        "reward_margin": steps[-1]["rewards/margins"],
    }


def _warn_of_drift(line: dict[str, Any], limit: float) -> None:
    drifted = line["drift"]
    if drifted is None:
        text = "the annotator's folder holds no confidence quantiles, so drift cannot be measured"
    elif drifted > limit:
        text = (
            f"confidence has drifted by {drifted:.3f} from that on held-out pairs: the annotator "
            "judges answers unlike those it was trained on; train it on labels of such answers "
            "before continuing"
        )
    else:
        return
    print(f"round {line['round']}: {text}", file=sys.stderr)


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the rounds as a table."""
    table = Table("round", "pairs", "confidence", "drift", "mean score", "loss", "margin", box=None)
    for line in lines:
        figures = (line[name] for name in ("mean_confidence", "drift", "mean_score", "loss"))
        table.add_row(
            str(line["round"]),
            f"{line['pairs']:,} of {line['prompts']:,}",
            *("-" if figure is None else f"{figure:.3f}" for figure in figures),
            f"{line['reward_margin']:.3f}",
        )
    Console().print(table)
