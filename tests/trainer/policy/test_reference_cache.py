from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from cwpo.errors import ConfigError
from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer
from cwpo_trainer.commands import Align
from cwpo_trainer.policy.reference_cache import ReferenceCache
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import weighted, write_lines

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def dataset(count=8, **columns) -> Dataset:
    rows = weighted(count)
    names = ("prompt", "chosen", "rejected", "confidence")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names} | columns)


def lora(rank=4):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def started(tiny_causal, tiny_tokenizer, tmp_path, folder):
    """A trainer that is about to train, and how often its policy has been read by then."""

    def start(data, *, model=None, lora=None, evaluation=None, **options):
        policy = model or AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32)
        passes = []
        policy.register_forward_hook(lambda *_: passes.append(1))
        given = dict(
            output_dir=str(tmp_path / "out"),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            save_strategy="no",
            disable_tqdm=True,
            reference_cache=str(folder),
            share_prompts=False,
        )
        trainer = ConfidenceDPOTrainer(
            model=policy,
            args=ConfidenceDPOConfig(**given | options),
            train_dataset=data,
            eval_dataset=evaluation,
            processing_class=copy.deepcopy(tiny_tokenizer),
            peft_config=lora,
        )
        return trainer, len(passes)

    return start


def log_probs(trainer):
    """Of the reference, by prompt."""
    data = trainer.train_dataset
    pairs = zip(*(data[name] for name in COLUMNS), strict=True)
    return dict(zip(map(tuple, data["prompt_ids"]), pairs, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_a_second_run_reads_no_pair(shared, started):
    _, without_reference = started(
        dataset(), share_prompts=shared, loss_type="simpo", reference_cache=None
    )
    plain, _ = started(
        dataset(), share_prompts=shared, reference_cache=None, precompute_ref_log_probs=True
    )
    first, passes = started(dataset(), share_prompts=shared)
    second, no_passes = started(dataset(), share_prompts=shared)
    assert passes == without_reference + 4
    assert no_passes == without_reference
    assert (first.pairs_from_cache, second.pairs_from_cache) == ({"train": 0}, {"train": 8})
    assert log_probs(plain) == log_probs(first) == log_probs(second)


def test_pairs_are_found_in_another_order_beside_others_and_under_other_weights(started, capsys):
    first, _ = started(dataset(8), evaluation=dataset(4))
    assert first.pairs_from_cache == {"train": 0, "eval": 4}
    rows = [7, 11, 2, 3, 10, 2, 11]
    data = dataset(12, confidence=[0.5] * 12).select(rows)
    _, of_one_pair = started(dataset(13).select([12]))
    second, of_two_pairs = started(data, loss_type="ipo", beta=0.2)
    assert second.pairs_from_cache == {"train": 4}
    assert "reference cache: 4 of 7 train pairs found in" in capsys.readouterr().err
    # Of what is missing, one batch of two: a pair that is there twice is read once.
    assert of_two_pairs == of_one_pair
    plain, _ = started(data, reference_cache=None, precompute_ref_log_probs=True)
    known, expected = log_probs(first), log_probs(plain)
    for prompt, values in log_probs(second).items():
        assert values == pytest.approx(expected[prompt], rel=1e-5)
        assert values == known.get(prompt, values)


@pytest.mark.parametrize(
    "other",
    [
        {"share_prompts": True},
        {"bf16": True},
        {"max_length": 12},
    ],
)
def test_pairs_that_are_read_otherwise_are_others(other, started):
    started(dataset())
    trainer, _ = started(dataset(), **other)
    assert trainer.pairs_from_cache == {"train": 0}


@pytest.mark.parametrize("other", ["weights", "configuration", "number format"])
def test_another_reference_has_pairs_of_its_own(other, tiny_causal, started):
    started(dataset())
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32)
    if other == "weights":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.25
    elif other == "configuration":
        model.config.rms_norm_eps = 0.5
    else:
        model = model.bfloat16()
    trainer, _ = started(dataset(), model=model)
    assert trainer.pairs_from_cache == {"train": 0}


def test_a_copy_of_the_reference_has_the_same_pairs(tiny_causal, tmp_path, started):
    started(dataset())
    copied = shutil.copytree(tiny_causal, tmp_path / "copied")
    model = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)
    for more in ({"model": model}, {"lora": lora()}, {"gradient_checkpointing": True}):
        assert started(dataset(), **more)[0].pairs_from_cache == {"train": 8}, more


def test_other_tokens_are_other_pairs(started):
    started(dataset())
    data = dataset()
    for name in ("prompt", "chosen", "rejected"):
        other = data.map(lambda row, name=name: {name: f"{row[name]} more"})
        assert started(other)[0].pairs_from_cache == {"train": 0}, name
    moved = [{"prompt_ids": [1] * at, "chosen_ids": [1] * (3 - at)} for at in (1, 2)]
    rows = [row | {"rejected_ids": [2], "confidence": 0.5} for row in moved]
    assert started(Dataset.from_list(rows[:1]))[0].pairs_from_cache == {"train": 0}
    assert started(Dataset.from_list(rows[1:]))[0].pairs_from_cache == {"train": 0}
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert started(swapped)[0].pairs_from_cache == {"train": 0}


def test_the_adapter_that_is_trained_is_no_part_of_the_reference(started):
    first, _ = started(dataset(), lora=lora(), seed=1)
    second, _ = started(dataset(), lora=lora(2), seed=2)
    assert second.pairs_from_cache == {"train": 8}
    assert log_probs(first) == log_probs(second)
    # Nor does training it make another reference of the model.
    first.train()
    first.evaluate(dataset())
    assert first.pairs_from_cache == {"train": 0, "eval": 8}


@pytest.mark.parametrize("damage", ["cut", "zeroed", "other values"])
def test_a_part_that_is_damaged_is_ignored(damage, started, folder):
    first, _ = started(dataset())
    (part,) = folder.glob("*/*.parquet")
    content = part.read_bytes()
    part.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "zeroed": bytes(len(content)),
            "other values": content[:200] + bytes(8) + content[208:],
        }[damage]
    )
    (part.parent / ".cut.parquet.1.partial").write_bytes(content[:100])
    second, _ = started(dataset())
    third, _ = started(dataset())
    assert (second.pairs_from_cache, third.pairs_from_cache) == ({"train": 0}, {"train": 8})
    assert log_probs(first) == log_probs(second) == log_probs(third)


def test_parts_are_written_before_the_last_pair(folder):
    pairs = {number.to_bytes(32): (-1.0 * number, -2.0) for number in range(5000)}
    interrupted = ReferenceCache(folder, "reference")
    for number, log_probs_of_pair in pairs.items():
        interrupted.add({number: log_probs_of_pair})
    found = ReferenceCache(folder, "reference").read(pairs)
    assert len(found) == 4096
    assert found.items() <= pairs.items()
    assert ReferenceCache(folder, "another").read(pairs) == {}


def test_a_pair_that_is_not_finite_is_not_kept(folder):
    pairs = {bytes(32): (-1.0, math.nan), b"\1" * 32: (-math.inf, -1.0), b"\2" * 32: (-1.0, -2.0)}
    cache = ReferenceCache(folder, "reference")
    cache.add(pairs)
    cache.write()
    assert cache.read(pairs) == {b"\2" * 32: (-1.0, -2.0)}


def test_a_disk_that_fails_costs_the_run_nothing(folder, capsys):
    cache = ReferenceCache(folder, "reference")
    cache.add({bytes(32): (-1.0, -2.0)})
    (folder / "reference").rmdir()
    (folder / "reference").touch()
    cache.write()
    assert "1 pairs are not kept in the reference cache" in capsys.readouterr().err


@pytest.fixture
def flags(tiny_causal, tmp_path, folder):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    return (
        *("--model", tiny_causal, "--data", data, "--batch-size", 3, "--threads", 1),
        *("--gradient-accumulation", 1, "--epochs", 1, "--learning-rate", 1e-2),
        *("--dtype", "float32", "--reference-cache", folder),
    )


def logged(run):
    """What was logged, but for the speed."""
    timings = ("runtime", "per_second")
    return [
        {name: value for name, value in line.items() if not name.endswith(timings)}
        for line in read_lines(run / "training.jsonl")
    ]


def test_the_rows_of_a_table_share_their_reference(flags, tmp_path, command, capsys):
    evaluated = ("--eval-fraction", 0.3)
    command(Align, *flags, *evaluated, "--output", tmp_path / "first")
    capsys.readouterr()
    command(Align, *flags, *evaluated, "--output", tmp_path / "second")
    err = capsys.readouterr().err
    assert "precompute reference" not in err
    first, second = (read_record(tmp_path / name).results for name in ("first", "second"))
    assert first["pairs_from_reference_cache"] == first["eval_pairs_from_reference_cache"] == 0
    assert second["pairs_from_reference_cache"] == second["pairs"]
    assert second["eval_pairs_from_reference_cache"] == second["eval_pairs"]
    assert f"reference cache: {second['pairs']} of {second['pairs']} train pairs found in" in err
    without_cache = (*flags[: flags.index("--reference-cache")], "--precompute-reference")
    command(Align, *without_cache, *evaluated, "--output", tmp_path / "without")
    without = logged(tmp_path / "without")
    assert len(without) > 3
    assert logged(tmp_path / "first") == logged(tmp_path / "second") == without
    command(Align, *flags, "--weight", "top", "--loss", "rdpo", "--output", tmp_path / "third")
    third = read_record(tmp_path / "third").results
    assert third["pairs_from_reference_cache"] == third["pairs"] < 16


def test_a_folder_of_something_else_is_refused(flags, folder, tmp_path, failure):
    output = ("--output", tmp_path / "out")
    folder.touch()
    assert f"{folder}: a file" in failure(Align, *flags, *output)
    below = (*flags, "--reference-cache", folder / "below", *output)
    assert "cannot be written: Not a directory" in failure(Align, *below)
    folder.unlink()
    for tag in ({}, {"CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n"}):
        for name, text in ({"model.safetensors": ""} | tag).items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        assert "not a reference cache: it holds" in failure(Align, *flags, *output)
    assert not (tmp_path / "out").exists()


def test_a_loss_without_a_reference_is_refused(flags, folder, tmp_path, failure):
    message = failure(Align, *flags, "--loss", "simpo", "--output", tmp_path / "out")
    assert "--reference-cache: simpo has no reference" in message
    with pytest.raises(ConfigError, match="reference_cache: orpo has no reference"):
        ConfidenceDPOConfig(
            output_dir=str(tmp_path), loss_type="orpo", reference_cache=str(folder), use_cpu=True
        )
    assert not folder.exists()


def align_processes(processes, *flags):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    words = [sys.executable, *launch, "-m", "cwpo_trainer.align", *flags]
    return subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)


def ended(process):
    _, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return err


@pytest.mark.slow
def test_processes_share_the_cache(flags, tmp_path, command):
    for name in ("first", "second"):
        ended(align_processes(2, *flags, "--output", tmp_path / name))
    assert logged(tmp_path / "first") == logged(tmp_path / "second")
    results = read_record(tmp_path / "second").results
    assert results["pairs_from_reference_cache"] == results["pairs"] == 16
    # One process finds what two have read; of a single new pair there is nothing for the second.
    more = write_lines(tmp_path / "more.jsonl", weighted(17))
    command(Align, *flags, "--output", tmp_path / "one")
    assert read_record(tmp_path / "one").results["pairs_from_reference_cache"] == 16
    ended(align_processes(2, *flags, "--data", more, "--output", tmp_path / "more"))
    results = read_record(tmp_path / "more").results
    assert (results["pairs_from_reference_cache"], results["pairs"]) == (16, 17)


@pytest.mark.slow
def test_runs_share_the_cache_at_the_same_time(flags, tmp_path, command):
    outputs = [tmp_path / name for name in ("left", "right")]
    for run in [align_processes(1, *flags, "--output", output) for output in outputs]:
        ended(run)
    command(Align, *flags, "--output", tmp_path / "after")
    assert read_record(tmp_path / "after").results["pairs_from_reference_cache"] == 16


SHARDED = """
import json, sys
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from cwpo_trainer.policy.reference_cache import reference_fingerprint
from cwpo_trainer.run.launch import leave

distributed.init_process_group("gloo")
found = []
for sharded in (False, True):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    if sharded:
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))
    found.append(reference_fingerprint(model, trained_adapter=None))
with open(f"{sys.argv[2]}.{distributed.get_rank()}", "w") as out:
    json.dump(found, out)
distributed.barrier()
distributed.destroy_process_group()
leave()
"""


@pytest.mark.slow
def test_a_sharded_reference_is_the_same(tiny_causal, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    words = ["torch.distributed.run", "--nproc-per-node", 2, script, tiny_causal, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        hex for rank in (0, 1) for hex in json.loads(Path(f"{tmp_path}/out.{rank}").read_text())
    }
    assert len(found) == 1
