"""Online CW-DPO (App. J.5): generate with the policy, annotate, align it, and so on in rounds.

The paper shows that this fails where the annotator does not keep up with the policy, whose answers
grow unlike those that it was trained on. Each round therefore measures the drift of confidence.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cwpo.client import Client, partial_file
from cwpo.commands import Annotate, errors_path
from cwpo.datasets import file_format, read_rows
from cwpo.errors import ConfigError, DatasetError
from cwpo.types import ModelInfo, Prompt, Score, ScoreItem
from cwpo_annotator.checkpoint import resolve
from cwpo_annotator.confidence import drift
from cwpo_trainer import align, preflight, runtime
from cwpo_trainer.commands import Align
from cwpo_trainer.losses import REFERENCE_FREE
from cwpo_trainer.prompts import prompts_of_round, read_prompts
from cwpo_trainer.record import LOG_NAME, ROUNDS_NAME, read_lines
from cwpo_trainer.sampling import LoadedPolicy, Sampling

if TYPE_CHECKING:
    from cwpo_trainer.commands import Online

_STARTED_NAME = "started.json"
# They change nothing of what a round computes.
_FREE = {"config", "resume", "rounds", "url", "api_key", "threads", "drift_limit", "output"}
_SCORED_AT_ONCE = 256


class Round:
    """One round's folder: what was generated, annotated and trained. Each appears when whole."""

    def __init__(self, output: Path, number: int) -> None:
        self.number = number
        self.folder = output / f"round-{number}"
        self.triplets = self.folder / "triplets.jsonl"
        self.weighted = self.folder / "weighted.parquet"
        self.policy = self.folder / "policy"


def run(settings: Online) -> None:
    """Do the rounds that are not done yet.

    Raises: CwpoError, before any model is loaded, for settings, prompts or a service that will not
        do; what a round has made stays, and --resume goes on from there.
    """
    if runtime.world_size() > 1:
        raise ConfigError("cwpo online runs as one process; align alone runs under torchrun")
    _check(settings)
    prompts = read_prompts(settings.prompts)
    resolve(settings.model)
    with settings.client() as client:
        annotator = client.model()
        _open(settings, annotator)
        log = settings.output / ROUNDS_NAME
        start = settings.model
        for number in range(1, settings.rounds + 1):
            this = Round(settings.output, number)
            asked = prompts_of_round(prompts, number, settings.prompts_per_round, settings.seed)
            if not this.triplets.exists():
                _generate(this, start, asked, settings, client)
            if not this.weighted.exists():
                _annotate(this, settings)
            if not this.policy.exists():
                align.run(_alignment(settings, this, start))
            if len(read_lines(log)) < number:
                with log.open("a") as sink:
                    sink.write(json.dumps(_measures(this, len(asked), annotator)) + "\n")
            _warn(read_lines(log)[number - 1], settings)
            start = str(this.policy)
    show(read_lines(log))
    print(f"the policy of the last round: {start}")


def _alignment(settings: Online, this: Round, start: str) -> Align:
    """The settings of the round's `cwpo align`, the rest of them from --align."""
    own: dict[str, Any] = {"reference": settings.model}
    return Align(
        config=settings.align,
        model=start,
        data=this.weighted,
        output=this.policy,
        resume=settings.resume,
        **(own if settings.reference == "first" and start != settings.model else {}),
    )


def _check(settings: Online) -> None:
    """Raises: ConfigError for settings of --align that a round has no use for."""
    one = _alignment(settings, Round(settings.output, 1), settings.model)
    for name, is_set in (
        ("labels: human", one.labels == "human"),
        ("annotator", one.annotator is not None),
        ("reference", one.reference is not None),
        ("push_to_hub", one.push_to_hub is not None),
        ("dry_run", one.dry_run),
    ):
        if is_set:
            raise ConfigError(f"--align {settings.align}: {name} is not for online rounds")
    if settings.reference == "first" and one.loss in REFERENCE_FREE:
        raise ConfigError(f"--reference first: {one.loss} has no reference; say --reference round")
    preflight.check(one)
    preflight.check_loss(one)


def _open(settings: Online, annotator: ModelInfo) -> None:
    """Create the output folder, or see that it is this very run that goes on in it."""
    digest = hashlib.sha256(settings.prompts.read_bytes())
    now = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if name not in _FREE and name != "align"
    }
    now |= {
        "sha256 of prompts": digest.hexdigest(),
        "--align": settings.align and settings.align.read_text(),
        "annotator": annotator.revision,
    }
    started = settings.output / _STARTED_NAME
    if not started.exists():
        if settings.output.exists():
            raise ConfigError(f"{settings.output} exists already: choose another --output")
        settings.output.mkdir(parents=True)
        started.write_text(json.dumps(now, indent=2) + "\n")
        return
    if not settings.resume:
        raise ConfigError(f"{settings.output} exists already: go on with --resume, or remove it")
    before = json.loads(started.read_text())
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"--resume: {name} was {before.get(name)!r} at the start of these rounds and is "
                f"{value!r} now"
            )


def _generate(
    this: Round, start: str, prompts: Sequence[Prompt], settings: Online, client: Client
) -> None:
    """Write the triplets: two different answers of the policy to each prompt that gets two."""
    runtime.prepare(seed=settings.seed, threads=settings.threads)
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
        seed=settings.seed + 1_000_003 * this.number,
    )
    repeated = [prompt for prompt in prompts for _ in range(settings.responses)]
    answers = LoadedPolicy(start, settings.dtype).sample(
        repeated, sampling, f"answers of round {this.number}"
    )
    # What the model holds is to be free before alignment.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    of_prompts = [
        # In order, each once, none empty.
        [
            *dict.fromkeys(
                answer for answer in answers[at : at + settings.responses] if answer.strip()
            )
        ]
        for at in range(0, len(answers), settings.responses)
    ]
    if settings.responses > 2:
        of_prompts = _best_and_worst(prompts, of_prompts, client, settings)
    usable = [(at, each) for at, each in enumerate(of_prompts) if len(each) >= 2]
    if not usable:
        raise DatasetError(
            f"round {this.number}: no prompt got two different answers: raise --temperature or "
            "--max-new-tokens"
        )
    this.folder.mkdir(exist_ok=True)
    with partial_file(this.triplets) as sink:
        for at, (first, second, *_) in usable:
            prompt = prompts[at]
            text = prompt if isinstance(prompt, str) else [turn.model_dump() for turn in prompt]
            row = {"id": f"{this.number}-{at + 1}", "prompt": text}
            row |= {"response_a": first, "response_b": second}
            sink.write(json.dumps(row).encode() + b"\n")


def _best_and_worst(
    prompts: Sequence[Prompt], of_prompts: list[list[str]], client: Client, settings: Online
) -> list[list[str]]:
    """Of each prompt's answers the two that the annotator scores highest and lowest."""
    items = [
        (at, ScoreItem(prompt=prompts[at], response=answer))
        for at, answers in enumerate(of_prompts)
        for answer in answers
    ]
    scored: list[list[tuple[float, str]]] = [[] for _ in of_prompts]
    for start in range(0, len(items), _SCORED_AT_ONCE):
        part = items[start : start + _SCORED_AT_ONCE]
        answer = client.score([item for _, item in part], truncation=settings.truncation)
        for (at, item), score in zip(part, answer.scores, strict=True):
            if isinstance(score, Score):
                scored[at].append((score.score, item.response))
    return [
        [max(each)[1], min(each)[1]] if len(each) >= 2 else [text for _, text in each]
        for each in scored
    ]


def _annotate(this: Round, settings: Online) -> None:
    """Through the service, as `cwpo annotate` does."""
    Annotate(
        input=this.triplets,
        output=this.weighted,
        url=settings.url,
        api_key=settings.api_key,
        truncation=settings.truncation,
    ).cli_cmd()


def _measures(this: Round, asked: int, annotator: ModelInfo) -> dict[str, Any]:
    """The line of rounds.jsonl."""
    with this.weighted.open("rb") as stream:
        rows = [row for _, row in read_rows(stream, file_format(this.weighted))]
    columns = {
        name: np.array([row[name] for row in rows if isinstance(row, dict)], dtype=np.float64)
        for name in ("confidence", "score_chosen", "score_rejected")
    }
    confidences, quantiles = columns["confidence"], annotator.confidence_quantiles
    steps = [line for line in read_lines(this.policy / LOG_NAME) if "loss" in line]
    return {
        "round": this.number,
        "prompts": asked,
        "pairs": len(rows),
        "without_a_pair": asked - len(read_lines(this.triplets)),
        "rejected": len(read_lines(errors_path(this.weighted))),
        "mean_confidence": float(confidences.mean()),
        "drift": None if quantiles is None else drift(confidences, quantiles),
        "mean_score": float((columns["score_chosen"] + columns["score_rejected"]).mean() / 2),
        "steps": len(steps),
        "loss": steps[-1]["loss"],
        "reward_margin": steps[-1]["rewards/margins"],
    }


def _warn(line: dict[str, Any], settings: Online) -> None:
    drifted = line["drift"]
    if drifted is None:
        text = "the annotator's folder holds no confidence quantiles, so drift cannot be measured"
    elif drifted > settings.drift_limit:
        text = (
            f"confidence has drifted by {drifted:.3f} from that on held-out pairs: the annotator "
            "judges answers unlike those it was trained on; train it on labels of such answers "
            "before going on"
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
