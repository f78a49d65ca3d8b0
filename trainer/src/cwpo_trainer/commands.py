"""The commands of the trainer, from `cwpo train-annotator` to `cwpo reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg, CliSubCommand

from cwpo.cli import AsJson, Command, settings_in
from cwpo.commands.service_command import ServiceCommand
from cwpo.errors import CwpoError
from cwpo_trainer.run import environment
from cwpo_trainer.settings.annotator_training import AnnotatorTraining
from cwpo_trainer.settings.data_preparation import Drawing, Mixing, Poisoning, Splitting
from cwpo_trainer.settings.evaluation import AnnotatorEvaluation, PolicyEvaluation
from cwpo_trainer.settings.online_alignment import OnlineAlignment
from cwpo_trainer.settings.policy_training import Alignment, FineTuning
from cwpo_trainer.settings.reproduction import Reproduction
from cwpo_trainer.settings.uploads import AnnotatorPublication, DatasetPublication

if TYPE_CHECKING:
    from cwpo_trainer.outcome import Outcome


class TrainAnnotator(AnnotatorTraining, Command):
    """Train an annotator, a small model that learns from human labels.

    DATA is split by conversation, so that all pairs of a prompt, and of prompts that continue it,
    are in the same part. The held-out pairs are not trained on; the annotator is measured on them
    at the end. If --labelled-fraction is
    below 1, the rest of the pairs is not used, and --splits writes all three parts to files for
    the next steps. A share of the labelled pairs is used for validation: it chooses the weights
    that are kept, and the calibration temperature in annotator.json. With --lora, the new scalar
    head is still trained in full.

    Example:
        cwpo train-annotator --model models/minilm --data pairs.jsonl --output runs/annotator
    """

    def cli_cmd(self) -> None:
        """Train."""
        environment.start_anew(self.config)
        from cwpo_trainer.annotators.pipeline import train_annotator

        train_annotator(self)


class Sft(FineTuning, Command):
    """Fine-tune the strong model on the chosen responses of the weighted dataset.

    Only the tokens of responses contribute to the loss. The output is a plain model, with any LoRA
    adapter merged and also kept in its folder `adapter`, or the adapter alone. `cwpo align` starts
    from it, and uses it as the reference model.

    Example:
        cwpo sft --model models/smollm2 --data weighted.parquet --output runs/sft --lora
    """

    def cli_cmd(self) -> None:
        """Train."""
        environment.start_anew(self.config)
        from cwpo_trainer.policy.fine_tuning import fine_tune

        fine_tune(self)


class Align(Alignment, Command):
    """Align the strong model on preferences weighted by confidence (CW-DPO, CW-IPO, CW-rDPO).

    Start from the output of `cwpo sft`. That model is also the reference model, unless --reference
    names another one. Dropout is switched off.

    Example:
        cwpo align --model runs/sft --data weighted.parquet --loss dpo --output runs/cw-dpo --lora
    """

    def cli_cmd(self) -> None:
        """Train."""
        environment.start_anew(self.config)
        from cwpo_trainer.policy.alignment import align

        align(self)


class Online(OnlineAlignment, ServiceCommand):
    """Align the strong model on its own answers, which the service annotates.

    Each round samples answers from the current policy, has the service annotate them, and aligns
    the policy on them as `cwpo align` does. OUTPUT/rounds.jsonl has the figures of each round. One
    is the drift of confidence from that on the annotator's held-out pairs: in the paper, online
    alignment fails once the policy's answers differ too much from the annotator's training data.

    With --update immediate there are no rounds: each optimiser step samples answers, has them
    annotated, and trains on them. OUTPUT is the trained policy, its training.jsonl has the figures
    of each step, and pairs.jsonl the annotated pairs.

    Example:
        cwpo online --model runs/sft --prompts prompts.jsonl --align align.yaml -o runs/online
    """

    def cli_cmd(self) -> None:
        """Train."""
        environment.start_anew(self.config)
        if self.update == "immediate":
            from cwpo_trainer.policy.immediate_updates import online
        else:
            from cwpo_trainer.policy.rounds import online

        # Each round has its own data and output, so those in the file are ignored.
        alignment = {
            **(settings_in(self.align, "--align") if self.align else {}),
            "config": self.align,
            "model": self.model,
            "data": self.prompts,
            "output": self.output,
            "resume": self.resume,
        }
        online(self, Alignment.model_validate(alignment), self.client())


class EvaluateAnnotator(AnnotatorEvaluation, Command):
    """Measure an annotator's agreement with human labels, and which of its labels can be trusted.

    DATA must be labels that the annotator has not seen: those of conversations that it was trained,
    stopped or calibrated on are refused. The verdict says above which confidence at most a share of
    --max-error of the labels is wrong, except with probability --delta, on data exchangeable with
    DATA; --certify keeps that in annotator.json. OUTPUT has the figures in run.json, the surest
    mistakes in mistakes.jsonl, and report.html.

    Example:
        cwpo evaluate annotator runs/annotator --data held_out.jsonl --max-error 0.1 --certify
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Measure."""
        environment.start_anew()
        from cwpo_trainer.evaluation.assessment import evaluate_annotator
        from cwpo_trainer.report.page import write_report

        found = evaluate_annotator(self)
        page = None if self.output is None else write_report([self.output])
        _tell(found, as_json=self.json_, page=page)
        if self.certify and found.figures["certificate"] is None:
            raise CwpoError(f"{self.annotator}: no certificate, as said above")


class EvaluatePolicy(PolicyEvaluation, Command):
    """Compare aligned policies with the model that they started from, and with a baseline.

    All models answer the same prompts, and a reward model that had no part in their training scores
    the answers. Gold reward accuracy (GRA) is the share of prompts on which it scores the policy's
    answer above that of the reference. Against the baseline, the page has the difference in GRA and
    in reward, with 95 % intervals over prompts, and the verdict says whether they show who is
    better. It also has what gives away a policy that only pleases the judge: length, repetition and
    KL divergence from the reference. On labelled pairs, it measures how often the chosen response
    has the higher implicit reward.

    With --llm-judge, a language model also compares the answers, in both orders, with the chosen
    responses of DATA or with the answers of the baseline.

    OUTPUT has the figures in run.json, the answers in samples.jsonl, and report.html.

    Example:
        cwpo evaluate policy runs/cw-dpo runs/ws-dpo --reference runs/sft --baseline runs/human \\
            --judge Skywork/Skywork-Reward-V2-Llama-3.1-8B --data test.jsonl -o runs/evaluation

        CWPO_LLM_JUDGE_KEY=... cwpo evaluate policy runs/cw-dpo --reference runs/sft \\
            --judge models/reward-model --data test.jsonl -o runs/win-rate \\
            --llm-judge https://api.openai.com/v1 --llm-judge-model gpt-4.1
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Measure."""
        environment.start_anew()
        from cwpo_trainer.evaluation.policies import evaluate_policies
        from cwpo_trainer.report.page import write_report

        found = evaluate_policies(self)
        _tell(found, as_json=self.json_, page=write_report([self.output]))


class Evaluate(Command):
    """Measure annotators and aligned policies.

    Example:
        cwpo evaluate annotator runs/annotator --data held_out.jsonl -o runs/accuracy
    """

    annotator: CliSubCommand[EvaluateAnnotator]
    policy: CliSubCommand[EvaluatePolicy]


class Report(Command):
    """Write one HTML page on one run or many, and its figures as JSON beside it.

    The page has the runs that are in and below the folders: tables of policies, annotators and
    trainings with 95 % intervals, all plots, answers side by side, settings and versions. It loads
    nothing from elsewhere.

    Example:
        cwpo report runs/demo

        cwpo report runs/cw-dpo runs/human runs/evaluation -o page.html
    """

    run: CliPositionalArg[list[Path]] = Field(
        min_length=1, description="Folders of runs, or with runs below them."
    )
    weighted: Path | None = Field(
        None,
        description="Weighted dataset for the histogram of confidence; by default "
        "weighted.parquet in each RUN.",
    )
    output: Path | None = Field(
        None,
        description="Page to write, with the JSON beside it; by default report.html in the only "
        "RUN.",
    )

    @model_validator(mode="after")
    def _page_has_a_place(self) -> Self:
        if self.output is None and len(self.run) > 1:
            raise ValueError("several runs have no folder in common: name the page, -o page.html")
        return self

    def cli_cmd(self) -> None:
        """Write the page and print its path."""
        from cwpo_trainer.report.page import write_report

        print(write_report(self.run, self.weighted, self.output))


class PushAnnotator(AnnotatorPublication, Command):
    """Upload an annotator to the Hub, with its card.

    Example:
        cwpo push annotator runs/annotator owner/annotator
    """

    def cli_cmd(self) -> None:
        """Upload."""
        from cwpo_trainer.publication import push_annotator

        push_annotator(self)


class PushDataset(DatasetPublication, Command):
    """Upload a weighted dataset to the Hub, with a card.

    The card names the annotator, and has a histogram of confidence.

    Example:
        cwpo push dataset weighted.parquet owner/weighted --license cc-by-4.0
    """

    def cli_cmd(self) -> None:
        """Upload."""
        from cwpo_trainer.publication import push_dataset

        push_dataset(self)


class Push(Command):
    """Upload annotators and weighted datasets to the Hugging Face Hub, as private repositories.

    Policies are uploaded by `--push-to-hub` of `cwpo sft` and `cwpo align`.

    Example:
        cwpo push dataset weighted.parquet owner/weighted --license cc-by-4.0
    """

    annotator: CliSubCommand[PushAnnotator]
    dataset: CliSubCommand[PushDataset]


class SplitData(Splitting, Command):
    """Split labelled pairs by conversation into labelled, unlabelled and held-out ones.

    `cwpo train-annotator --splits` writes the same parts while it trains; several annotators that
    are to be compared share these.

    Example:
        cwpo data split pairs.jsonl --labelled-fraction 0.3 -o runs/splits
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Split."""
        from cwpo_trainer.data.preparation import split_pairs

        _tell(split_pairs(self), as_json=self.json_)


class PoisonData(Poisoning, Command):
    """Flip a share of the labels, to see what wrong labels do to an annotator.

    The column flipped says which. A Parquet file keeps in its metadata, as cwpo.provenance, what
    was done.

    Example:
        cwpo data poison pairs.jsonl --share 0.1 -o poisoned.parquet
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Poison."""
        from cwpo_trainer.data.preparation import poison

        _tell(poison(self), as_json=self.json_)


class MixData(Mixing, Command):
    """Mix labelled pairs of several sources in given shares, for labels that are out of balance.

    Pairs are drawn at random, and written in random order; the column source says where each is
    from.

    Example:
        cwpo data mix --sources harmless.jsonl=0.8 --sources helpful.jsonl=0.2 -o mixed.parquet
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Mix."""
        from cwpo_trainer.data.preparation import mix

        _tell(mix(self), as_json=self.json_)


class DrawData(Drawing, Command):
    """Draw labels from the probabilities of an annotator, which thereby stands for people.

    In such a world it is known how good every answer is. Labels follow the Bradley-Terry model
    (eq. 4 of the paper) with the scores of the weighted dataset.

    Example:
        cwpo data draw weighted.parquet --noise 0.2 -o labelled.parquet
    """

    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Draw."""
        from cwpo_trainer.data.preparation import draw_labels

        _tell(draw_labels(self), as_json=self.json_)


def _tell(outcome: Outcome, *, as_json: bool, page: Path | None = None) -> None:
    if as_json:
        print(json.dumps({**outcome.figures, **({"page": str(page)} if page else {})}, indent=2))
    else:
        print(outcome.summary if page is None else f"{outcome.summary}\n{page}")


class Data(Command):
    """Prepare labelled pairs: split, poison, mix, or draw labels.

    Example:
        cwpo data split pairs.jsonl -o runs/splits
    """

    split: CliSubCommand[SplitData]
    poison: CliSubCommand[PoisonData]
    mix: CliSubCommand[MixData]
    draw: CliSubCommand[DrawData]


class Reproduce(Reproduction, Command):
    """Make a table or figure of the CW-PO paper anew, or print the commands that do.

    Each row is a run of the other commands, in OUTPUT/steps; rows and recipes share what they have
    in common. OUTPUT has for each recipe the table, with the paper's figures beside ours, and
    results.json. A row that is finished is not run again, and an interrupted training goes on from
    its checkpoint.

    Example:
        cwpo reproduce table-6 --data data --seeds 3
    """

    def cli_cmd(self) -> None:
        """Reproduce."""
        from cwpo_trainer.reproduction.session import reproduce

        reproduce(self)
