"""The two scales: which models, data and settings stand for those of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cwpo.datasets.triplets import is_triplet_file
from cwpo.errors import ConfigError
from cwpo_trainer.reproduction.step import LocalPath
from cwpo_trainer.run.process import threads_each, use_bfloat16
from cwpo_trainer.settings.reproduction import Reproduction, ScaleName

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """Labelled pairs that stand for a data set of the paper.

    pairs: file or Hub id; None where this scale has none, and `missing` says why.
    test: pairs of other prompts to measure policies on; None holds some of `pairs` out.
    judge: gold reward model that scores answers; None trains one on labels of its own.
    for_policies: whether policies are trained on it, too.
    max_length: tokens of prompt and response together.
    asked: what an LLM judge is asked of its answers, `--llm-judge-prompt`.
    """

    pairs: str | None
    test: str | None = None
    judge: str | None = None
    for_policies: bool = True
    max_length: int = 512
    asked: str = "chatbot"
    missing: str = ""

    @property
    def source(self) -> str:
        """The pairs. Raises: ConfigError where there are none."""
        if self.pairs is None:
            raise ConfigError(self.missing)
        return self.pairs


@dataclass(frozen=True)
class Scale:
    """What stands for the models, data and settings of the paper.

    weak, strong: models by the paper's names for them; what is not there is not run.
    implicit: models of annotators that are trained with DPO, which have to be language models.
    layers: of the weak model, for the sizes of Table 12; None for a model of its own.
    annotator, sft, align, online, evaluation: settings of the commands, but for models and data.
    language_annotator: those of annotators that are language models, where they differ.
    llm_judge: of an LLM that compares answers; without any, none does.
    minutes: expected of a step of each command.
    gpus: of a step that trains a model of this name, if more than one.
    has_gpus: whether its models need a GPU.
    """

    name: ScaleName
    weak: Mapping[str, str]
    implicit: Mapping[str, str]
    strong: Mapping[str, str]
    data: Mapping[str, DataSet]
    annotator: Flags
    sft: Flags
    align: Flags
    online: Flags
    evaluation: Flags
    minutes: Mapping[str, float]
    layers: Mapping[str, int] = field(default_factory=dict)
    gpus: Mapping[str, int] = field(default_factory=dict)
    has_gpus: bool = False
    language_annotator: Flags = field(default_factory=dict)
    llm_judge: Flags = field(default_factory=dict)

    def data_set(self, name: str) -> DataSet:
        """What stands for the paper's data set of this name."""
        return self.data.get(name, DataSet(None, missing=f"no data for {name} at this scale"))


_SMALL_MODELS = ("minilm", "smollm2")
_HARMLESS, _HELPFUL = "hh_harmless", "qa_feedback"
_SKYWORK = "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
_DEBERTA = "OpenAssistant/reward-model-deberta-v3-large-v2"
_STEAMSHP = "stanfordnlp/SteamSHP-flan-t5-large"

# The paper's settings; a value that it does not state is marked `chosen`. trainer/recipes has the
# same in files, and a test compares them.
PAPER_ANNOTATOR = {
    "epochs": 5,
    "batch_size": 32,
    "learning_rate": 2e-5,  # chosen
    "dtype": "bfloat16",  # chosen
}
_PAPER_POLICY = {
    "batch_size": 16,
    "gradient_accumulation": 4,
    "warmup_steps": 100,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,  # chosen
    "optimizer": "paged_adamw_32bit",
    "gradient_checkpointing": True,
    "lora": True,
    "dtype": "bfloat16",  # chosen
    "save_steps": 200,  # chosen
    "adapter_only": True,
}
PAPER_SFT = {**_PAPER_POLICY, "epochs": 3, "learning_rate": 1e-4}  # learning rate chosen
PAPER_ALIGN = {**_PAPER_POLICY, "epochs": 5, "learning_rate": 2e-5, "beta": 0.5}  # likewise
# The steps of Table 21's runs are chosen: 500 of 64 prompts each.
_PAPER_ONLINE = {"max_new_tokens": 256, "temperature": 0.9, "batch_size": 64}

_SMALL_POLICY = {
    "lora": True,
    "adapter_only": True,
    "batch_size": 4,
    "max_grad_norm": 1.0,
    "warmup_steps": 4,
    "save_steps": 0,
}


def scale_of(settings: Reproduction) -> Scale:
    """The scale that was asked for. Raises: ConfigError where its files or models are not there."""
    if settings.scale == "paper":
        return paper(settings)
    if settings.data is None:
        raise ConfigError("--data: name the folder of labelled pairs, such as hh_harmless.jsonl.gz")
    for name in _SMALL_MODELS:
        if not (settings.models / name).is_dir():
            raise ConfigError(
                f"{settings.models / name}: no such folder; --models has to hold minilm and "
                "smollm2, which examples/models.py unpacks from two packages"
            )
    return small(settings)


def small(settings: Reproduction) -> Scale:
    """Models of packages, and files of a few thousand pairs, on a few CPU cores."""
    minilm, smollm2 = (LocalPath(settings.models / name) for name in _SMALL_MODELS)

    def local(name: str, **more: Any) -> DataSet:
        # Recipes are listed as if the files were there, where no folder is named.
        found = LocalPath(name) if settings.data is None else _file_of(settings.data, name)
        return DataSet(found, missing=f"--data has no {name}", **more)

    both = f"mix of {_HARMLESS} and {_HELPFUL}"
    threads: Flags = {} if settings.threads is None else {"threads": settings.threads}
    if not threads and settings.parallel > 1:
        threads = {"threads": threads_each(settings.parallel)}
    return Scale(
        "small",
        weak={"OPT-125M": minilm, "Qwen2.5-0.5B": minilm},
        implicit={"OPT-125M": smollm2, "Qwen2.5-0.5B": smollm2},
        # One policy, beside the first block of each table.
        strong={"OPT-1.3B": smollm2, "OPT-13B": smollm2},
        data={
            "Harmless": local(_HARMLESS),
            "Helpful": local(_HELPFUL, for_policies=False),
            "HH-RLHF": DataSet(both, missing=f"--data lacks {_HARMLESS} or {_HELPFUL}"),
            "UFB": local("ultrafeedback_1k"),
            "TL;DR": DataSet(None, missing="no summaries at this scale"),
        },
        annotator={
            "epochs": 3,
            "batch_size": 8,
            "learning_rate": 1e-4,
            "save_steps": 50,
            **threads,
        },
        sft={**_SMALL_POLICY, **threads, "max_steps": 40, "gradient_accumulation": 1}
        | {"learning_rate": 2e-4},
        align={**_SMALL_POLICY, **threads, "max_steps": 40, "gradient_accumulation": 2}
        | {"learning_rate": 1e-4, "beta": 0.5},
        online={"max_new_tokens": 48, "temperature": 0.9, "batch_size": 16},
        # All prompts that are held out, which are fewer. Adapters lose nothing in bfloat16: it is
        # the sum with the weights that would.
        evaluation={"prompts": 500, "max_new_tokens": 64, "temperature": 0.7, **threads}
        | ({"dtype": "bfloat16"} if use_bfloat16("auto") else {}),
        llm_judge=_llm_judge(settings),
        minutes=SMALL_MINUTES,
        layers={"0.5B": 1, "1.5B": 2, "3B": 4, "7B": 6},
        # They are six times as large.
        language_annotator={"epochs": 1},
    )


def paper(settings: Reproduction) -> Scale:
    """The paper's models and data sets, by their ids on the Hub.

    A file of the folder --data takes the place of a data set, by name, such as harmless.jsonl and
    harmless_test.jsonl. SHP has to be there: its rows on the Hub are no pairs.
    """
    data = settings.data

    def hub(name: str, pairs: str | None, test: str | None, judge: str, **more: Any) -> DataSet:
        return DataSet(
            _file_of(data, name) or pairs,
            _file_of(data, f"{name}_test") or test,
            judge,
            missing=f"--data has no {name}.jsonl",
            **more,
        )

    hh, ufb, tldr = (
        "Anthropic/hh-rlhf",
        "HuggingFaceH4/ultrafeedback_binarized",
        "trl-lib/tldr-preference",
    )
    domains = ("askacademia", "askbaking", "askengineers", "askphilosophy")
    qwen = {f"Qwen2.5-{size}": f"Qwen/Qwen2.5-{size}" for size in _QWEN_SIZES}
    opt = {f"OPT-{size}": f"facebook/opt-{size.lower()}" for size in _OPT_SIZES}
    return Scale(
        "paper",
        weak=opt | qwen,
        implicit=opt | qwen,
        strong=opt | qwen | {"Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct"},
        data={
            "Harmless": hub(
                "harmless", f"{hh}/harmless-base", f"{hh}/harmless-base@test", _SKYWORK
            ),
            "Helpful": hub("helpful", f"{hh}/helpful-base", f"{hh}/helpful-base@test", _SKYWORK),
            "HH-RLHF": DataSet("mix of harmless and helpful", None, _SKYWORK),
            "UFB": hub("ufb", f"{ufb}@train_prefs", f"{ufb}@test_prefs", _SKYWORK),
            "TL;DR": hub(
                "tldr", tldr, f"{tldr}@validation", _DEBERTA, max_length=1024, asked="summary"
            ),
            **{name: hub(name, None, None, _STEAMSHP) for name in domains},
        },
        annotator=PAPER_ANNOTATOR,
        sft=PAPER_SFT,
        align=PAPER_ALIGN,
        online=_PAPER_ONLINE,
        evaluation={"prompts": 2000, "max_new_tokens": 256, "temperature": 0.7},
        llm_judge=_llm_judge(settings),
        minutes={},
        gpus={"Qwen/Qwen2.5-7B": 8},
        has_gpus=True,
    )


# Of a step on two free CPU cores: expected, not measured.
SMALL_MINUTES = {
    "train-annotator": 6,
    "annotate": 2,
    "sft": 4,
    "align": 8,
    "online": 20,
    "evaluate annotator": 2,
    "evaluate policy": 12,
}
_QWEN_SIZES = ("0.5B", "1.5B", "3B", "7B", "14B")
_OPT_SIZES = ("125M", "1.3B", "2.7B", "6.7B", "13B")


def _llm_judge(settings: Reproduction) -> Flags:
    if settings.llm_judge is None:
        return {}
    return {"llm_judge": settings.llm_judge, "llm_judge_model": settings.llm_judge_model}


def _file_of(folder: Path | None, name: str) -> LocalPath | None:
    """The file of pairs in the folder whose name this is, without its suffix."""
    if folder is None or not folder.is_dir():
        return None
    found = sorted(
        path for path in folder.iterdir() if is_triplet_file(path.name) and _stem(path) == name
    )
    return LocalPath(found[0]) if found else None


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]
