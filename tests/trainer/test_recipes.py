"""The recipes are settings that the commands know, of models with the sizes that they name."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import LlamaConfig, OPTConfig, Qwen2Config

from cwpo_trainer.commands import Align, Sft, TrainAnnotator
from cwpo_trainer.policy.sharding import FSDP2, ZERO3

from .samples import pairs, weighted, write_lines

RECIPES = Path(__file__).parents[2] / "trainer" / "recipes"
KINDS = {"align": Align, "sft": Sft, "annotator": TrainAnnotator}
SHARED = sorted((RECIPES / "paper").glob("*.yaml"))
FILES = [
    path
    for path in sorted(RECIPES.glob("*/*.yaml"))
    if path.parent.name not in ("accelerate", "paper")
]
# Settings that a size gives for itself.
SIZES_OWN = {"model", "data", "output", "splits"}
# Layers, width and width of the feed-forward part, as the models' own configurations have them.
SHAPES = {
    "opt-1.3b": (OPTConfig, 24, 2048, 8192),
    "opt-2.7b": (OPTConfig, 32, 2560, 10240),
    "opt-6.7b": (OPTConfig, 32, 4096, 16384),
    "opt-13b": (OPTConfig, 40, 5120, 20480),
    "qwen2.5-1.5b": (Qwen2Config, 28, 1536, 8960),
    "qwen2.5-3b": (Qwen2Config, 36, 2048, 11008),
    "qwen2.5-7b": (Qwen2Config, 28, 3584, 18944),
    "qwen2.5-14b": (Qwen2Config, 48, 5120, 13824),
    "llama-3.1-8b": (LlamaConfig, 32, 4096, 14336),
}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def config(name):
    kind, layers, width, inner = SHAPES[name]
    common = dict(hidden_size=width, num_hidden_layers=layers)
    if kind is OPTConfig:
        heads = 32 if width < 5120 else 40
        inner = dict(ffn_dim=inner, num_attention_heads=heads, word_embed_proj_dim=width)
        return OPTConfig(**common, **inner, vocab_size=50272)
    grouped = dict(num_attention_heads=width // 128, num_key_value_heads=2 if width < 3000 else 8)
    if name == "qwen2.5-7b":
        grouped["num_key_value_heads"] = 4
    small = name in ("qwen2.5-1.5b", "qwen2.5-3b")
    vocabulary = {LlamaConfig: 128256}.get(kind, 151936 if small else 152064)
    return kind(
        **common,
        **grouped,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=small,
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_setting_is_known(path):
    command = KINDS[path.stem](config=path)
    shared = yaml.safe_load((RECIPES / "paper" / path.name).read_text())
    own = yaml.safe_load(path.read_text())
    assert {"extends", "model", "data", "output"} <= own.keys() <= {"extends", *SIZES_OWN}
    for name, value in {**shared, **own}.items():
        if name != "extends":
            found = getattr(command, name)
            assert (str(found) if isinstance(found, Path) else found) == value


@pytest.mark.parametrize("path", SHARED, ids=name_of)
def test_the_origin_of_every_shared_setting_is_said(path):
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            assert line.partition(":")[0] not in SIZES_OWN
            assert re.search(r"# (paper|chosen)\b", line), line


def test_the_configurations_of_accelerate_load():
    for path in (RECIPES / "accelerate").glob("*.yaml"):
        assert load_config_from_file(str(path)).num_processes == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_size_can_be_planned(name, tiny_tokenizer, tmp_path, command, capsys):
    model = tmp_path / "model"
    tiny_tokenizer.save_pretrained(model)
    config(name).save_pretrained(model)
    data = write_lines(tmp_path / "weighted.jsonl", weighted(8))
    recipe = RECIPES / name / "align.yaml"
    command(Align, "--config", recipe, "--model", model, "--data", data, "--dry-run")
    text = " ".join(capsys.readouterr().out.split())
    millions = float(re.search(r"([\d.,]+) M parameters", text)[1].replace(",", ""))
    nominal = float(re.search(r"([\d.]+)b$", name)[1]) * 1000
    assert millions == pytest.approx(nominal, rel=0.1)
    assert "H100 80 GB │ 80 │ yes │ 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"])
def test_every_annotator_fits_on_eight_gpus(name, tiny_tokenizer, tmp_path, command, capsys):
    model = tmp_path / "model"
    tiny_tokenizer.save_pretrained(model)
    config(name).save_pretrained(model)
    data = write_lines(tmp_path / "pairs.jsonl", pairs(40))
    flags = ("--config", RECIPES / name / "annotator.yaml", "--model", model, "--data", data)
    command(TrainAnnotator, *flags, "--dry-run")
    fits_on_one = "no" if name == "qwen2.5-7b" else "yes"
    said = " ".join(capsys.readouterr().out.split())
    assert f"H100 80 GB │ 80 │ {fits_on_one} │" in said
    millions = float(re.search(r"([\d.,]+) M parameters", said)[1].replace(",", ""))
    assert millions == pytest.approx(float(re.search(r"([\d.]+)b$", name)[1]) * 1000, rel=0.1)
    shared = ("--gradient-checkpointing", "--sharding", "fsdp2", "--world-size", 8)
    command(TrainAnnotator, *flags, *shared, "--dry-run")
    assert "A100 40 GB │ 40 │ yes │" in " ".join(capsys.readouterr().out.split())


def test_every_policy_has_a_recipe():
    assert SHAPES.keys() == {path.parent.name for path in FILES if path.stem == "align"}
    assert SHAPES.keys() == {path.parent.name for path in FILES if path.stem == "sft"}


def test_accelerate_shards_as_the_flag_does():
    fsdp = load_config_from_file(str(RECIPES / "accelerate" / "fsdp2.yaml")).fsdp_config
    assert {name.removeprefix("fsdp_"): value for name, value in fsdp.items()} == FSDP2
    assert json.loads((RECIPES / "accelerate" / "zero3.json").read_text()) == ZERO3


def test_the_launch_lines_are_settings_that_fit_together(command):
    class Read(Align):
        """Reads flags.

        Example:
            cwpo read
        """

        def cli_cmd(self):
            assert self.config.is_file()
            read.append(self)

    read = []
    text = (RECIPES / "README.md").read_text().replace("\\\n", " ")
    lines = [
        line for line in text.splitlines() if "cwpo_trainer.align" in line and "--conf" in line
    ]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.partition("cwpo_trainer.align")[2])
        at = words.index("--config") + 1
        words[at] = RECIPES.parents[1] / words[at]
        command(Read, *words)
    assert [one.lora for one in read] == [True, False]
