from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from cwpo_trainer.commands import Align
from cwpo_trainer.lora import lora_config
from cwpo_trainer.plan import estimate
from cwpo_trainer.plan.estimate import DEVICES, FIRST_PASSES, Method, Shape
from cwpo_trainer.policy import alignment, fine_tuning
from cwpo_trainer.policy.loading import (
    load,
    load_for_training,
    load_reference,
    load_tokenizer,
)
from cwpo_trainer.policy.packed_model import read_packed
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import read_lines
from cwpo_trainer.settings.policy_training import Alignment, FineTuning

from ..samples import weighted, write_lines
from .measured import assert_near_peak, counted_by_torch, planned

# Share of the measured peak that the estimate may be off by. It counts a layer's activations as if
# its units were gated; OPT's layers keep fewer.
TOLERANCES = {"llama": 0.2, "opt": 0.4}


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "weighted.jsonl", weighted(16))


def plan_alignment(settings):
    training, _ = alignment.weighted_parts(settings, load_tokenizer(Path(settings.model)))
    fitting = alignment.weighted_fitting(training, settings.max_length)
    use = alignment.reference_use(settings, settings)
    return alignment.plan(settings, fitting, "a loss", use)


def plan_fine_tuning(settings):
    training, _ = fine_tuning.response_parts(settings, load_tokenizer(Path(settings.model)))
    return fine_tuning.plan(settings, training.fitting(settings.max_length))


STEPS = {
    "align": (Alignment, plan_alignment, alignment.align),
    "sft": (FineTuning, plan_fine_tuning, fine_tuning.fine_tune),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "model", "more"),
    [
        ("align", "llama", {}),
        ("align", "llama", {"gradient_checkpointing": True, "batch_size": 16}),
        ("align", "llama", {"lora": True, "batch_size": 16}),
        ("align", "opt", {"loss": "simpo", "batch_size": 8}),
        ("sft", "llama", {"gradient_accumulation": 2, "batch_size": 8}),
    ],
)
def test_the_estimate_is_near_the_measured_peak(step, model, more, wide_models, data, tmp_path):
    kind, plan, train = STEPS[step]
    given = dict(model=str(wide_models / model), data=data, output=tmp_path / "out", threads=1)
    small = dict(batch_size=4, gradient_accumulation=1, max_steps=2, dtype="float32")
    settings = kind(**given | small | more)
    assert_near_peak(plan(settings), lambda: train(settings), TOLERANCES[model])


@pytest.fixture
def alike(tmp_path):
    """Pairs whose texts all have as many tokens, so that there is no padding to count."""
    words = {"prompt": "what about the water", "chosen": "kind good help"}
    rows = [row | words | {"rejected": "good kind help"} for row in weighted(8)]
    return write_lines(tmp_path / "alike.jsonl", rows)


def counted_in_trials(folder, settings, step):
    """Operations to find out whether the models of a run read packed rows."""
    if not settings.share_prompts:
        return 0
    policy = load(folder)
    if settings.lora:
        policy = get_peft_model(policy, lora_config(settings, policy, dropout=0, task="CAUSAL_LM"))
    has_reference = (
        step == "align"
        and settings.reads_reference
        and not settings.lora
        and not settings.precompute_reference
    )
    tried = [policy, load(folder).requires_grad_(True)] if has_reference else [policy]
    return counted_by_torch(lambda: [read_packed(model, bfloat16=False) for model in tried])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "more", "tolerance"),
    [
        ("align", {}, 0.01),
        ("align", {"share_prompts": False}, 1e-9),
        ("align", {"loss": "simpo"}, 0.01),
        ("align", {"precompute_reference": True, "epochs": 2}, 0.01),
        ("sft", {}, 0.01),
        ("sft", {"share_prompts": False}, 1e-9),
        # Each layer's last product is not done again.
        ("align", {"gradient_checkpointing": True}, 0.06),
        # Nothing before the first adapters is trained, so that their inputs need no gradient.
        ("align", {"lora": True}, 0.06),
    ],
)
def test_operations_are_those_that_torch_counts(
    step, more, tolerance, wide_models, alike, tmp_path
):
    kind, plan, train = STEPS[step]
    given = dict(model=str(wide_models / "llama"), data=alike, output=tmp_path / "out", threads=1)
    small = dict(batch_size=4, gradient_accumulation=1, epochs=1, dtype="float32")
    settings = kind(**given | small | more)
    estimated = plan(settings)
    counted = counted_by_torch(lambda: train(settings))
    counted -= counted_in_trials(wide_models / "llama", settings, step)
    assert estimated.operations(on_cpu=True) == pytest.approx(counted, rel=tolerance)


@pytest.mark.slow
def test_a_dry_run_counts_what_training_reads(wide_models, data, tmp_path, command, capsys):
    flags = ("--model", wide_models / "llama", "--data", data, "--output", tmp_path / "out")
    flags = (*flags, "--batch-size", 2, "--gradient-accumulation", 1, "--epochs", 2)
    command(Align, *flags, "--world-size", 2, "--dry-run")
    tokens, steps = planned(capsys)
    assert steps == 8
    assert not (tmp_path / "out").exists()
    command(Align, *flags, "--dtype", "float32", "--learning-rate", 1e-9)
    lines = read_lines(tmp_path / "out" / "training.jsonl")
    assert (len(lines), lines[-1]["num_tokens"]) == (16, 2 * tokens)


def test_on_a_cpu_the_process_counts_and_numbers_are_those_that_it_computes_with(
    wide_models, data, tmp_path
):
    given = dict(model=str(wide_models / "llama"), data=data, output=tmp_path / "out", lora=True)
    by_dtype = {
        dtype: plan_alignment(Alignment(**given, dtype=dtype))
        for dtype in ("auto", "float32", "bfloat16")
    }
    here = by_dtype["bfloat16" if process.use_bfloat16("auto") else "float32"]
    auto = by_dtype["auto"]
    assert auto.memory(on_cpu=True).weights == here.memory(on_cpu=True).weights
    # A GPU is taken to compute in bfloat16.
    assert auto.memory().weights == by_dtype["bfloat16"].memory().weights
    assert auto.memory().process == 0
    # Python with torch alone has that many.
    libraries = auto.memory(on_cpu=True).process - FIRST_PASSES
    assert 100e6 < libraries <= psutil.Process().memory_info().rss * 1.1


@pytest.fixture
def deep(tiny_tokenizer, tmp_path):
    """A model whose activations are as much as all libraries."""
    size = dict(hidden_size=192, intermediate_size=1536, num_hidden_layers=20)
    tokens = dict(vocab_size=len(tiny_tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**size, **tokens, num_attention_heads=4))
    model.save_pretrained(tmp_path / "deep")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


@pytest.fixture
def long(tmp_path):
    """Pairs of many lengths."""
    words = ["kind", "good", "help", "about", "water"]
    rows = [
        row | {"prompt": "what", "chosen": text, "rejected": f"bad {text}"}
        for number, row in enumerate(weighted(16))
        for text in [" ".join(words * (20 + 3 * number))]
    ]
    return write_lines(tmp_path / "long.jsonl", rows)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak")
@pytest.mark.parametrize("more", [(), ("--lora",), ("--lora", "--gradient-checkpointing")])
def test_on_a_cpu_the_whole_process_takes_what_was_said(more, deep, long, tmp_path):
    flags = ("--model", deep, "--data", long, "--output", tmp_path / "out", "--max-steps", "3")
    flags = (*flags, "--batch-size", "4", "--gradient-accumulation", "1", "--max-length", "1024")
    command = [sys.executable, "-m", "cwpo", "align", *map(str, flags), "--dtype", "float32", *more]
    plan = subprocess.run([*command, "--dry-run"], stdout=subprocess.PIPE, text=True, check=True)
    said = float(re.search(r"memory\s+([\d.]+) GiB", plan.stdout)[1])
    with subprocess.Popen(command) as training:
        peak = 0.0
        while training.poll() is None:
            status = Path(f"/proc/{training.pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                peak = int(found[1]) / 2**20
            time.sleep(0.02)
    print(f"{said:.2f} GiB estimated, {peak:.2f} measured")
    assert training.returncode == 0
    assert said == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("model", ["llama", "opt"])
@pytest.mark.parametrize("more", [{}, {"sharding": "fsdp2"}, {"lora": True, "reference": ""}])
def test_main_memory_is_what_the_loaded_models_hold(
    model, more, wide_models, data, tmp_path, monkeypatch, capsys
):
    folder = str(wide_models / model)
    settings = Alignment(
        model=folder,
        data=data,
        output=tmp_path / "out",
        world_size=16,
        **more | ({"reference": folder} if "reference" in more else {}),
    )
    policy = load_for_training(folder, is_frozen=settings.lora, bfloat16=True)
    if settings.lora:
        reference = load_for_training(folder, is_frozen=True, bfloat16=True)
    else:
        is_sharded = settings.sharding != "none"
        reference = load_reference(folder, bfloat16=True, is_sharded=is_sharded)
    held = [sum(weight.nbytes for weight in each.parameters()) for each in (policy, reference)]
    plan = plan_alignment(settings)
    # Biases are not counted apart.
    assert plan.loaded == pytest.approx(held, rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    plan = plan_alignment(settings)
    plan.show()
    said = " ".join(capsys.readouterr().out.split())
    needed, count = re.search(
        r"main memory ([\d.e-]+) GiB .* node of (\d+) processes", said
    ).groups()
    # With FSDP2 the first process hands its shares to the others.
    loading = 1 if settings.sharding == "fsdp2" else 4
    assert (float(needed), count) == (pytest.approx(loading * sum(held) / 2**30, rel=0.01), "4")


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "mlp.down_proj")], ids=len)
def test_the_adapters_that_count_are_those_of_the_targets(targets, wide_models, data, tmp_path):
    folder = wide_models / "llama"
    settings = Alignment(
        model=str(folder), data=data, output=tmp_path, lora=True, lora_targets=[*targets]
    )
    policy = load_for_training(str(folder), is_frozen=True, bfloat16=True)
    adapted = get_peft_model(policy, lora_config(settings, policy, dropout=0, task="CAUSAL_LM"))
    held = sum(p.numel() for p in adapted.parameters() if p.requires_grad) * 4
    assert plan_alignment(settings).memory().adapters == held


def test_the_reference_cache_is_planned_with(wide_models, data, tmp_path, command, capsys):
    cache = tmp_path / "cache"
    flags = ("--model", wide_models / "llama", "--data", data, "--output", tmp_path / "out")
    flags = (*flags, "--batch-size", 4, "--gradient-accumulation", 1, "--epochs", 1)
    command(Align, *flags, "--reference-cache", cache, "--dry-run")
    said = " ".join(capsys.readouterr().out.split())
    (percent,) = re.findall(
        r"reference cache at most 1 MB for 16 pairs in .* takes (\d+)% less time", said
    )
    # Of four passes, the head's again in the backward pass with them, one is the reference's.
    assert 18 <= int(percent) <= 26
    assert not cache.exists()
    command(Align, *flags, "--dry-run")
    assert "reference cache" not in capsys.readouterr().out


def test_more_devices_or_fewer_trained_weights_need_less(wide_models, tmp_path):
    shape = Shape.read(wide_models / "llama")
    model = AutoModelForCausalLM.from_pretrained(wide_models / "llama")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    batch = dict(tokens=16 * 512, scored=16 * 256, with_reference=False)
    method = Method(accumulation=4)
    whole = estimate.memory(shape, method, **batch)
    assert estimate.memory(shape, method, **batch, sharded_over=4).total < whole.total
    for saver in ({"lora_rank": 8}, {"checkpointing": True}):
        sparing = dataclasses.replace(method, **saver)
        assert estimate.memory(shape, sparing, **batch).total < whole.total
    big = dataclasses.replace(shape, parameters=13_000_000_000, layers=40)
    needed = estimate.devices_needed(DEVICES[0], big, method, **batch)
    assert needed in (16, 32)
    assert estimate.devices_needed(DEVICES[-1], big, method, **batch) < needed
