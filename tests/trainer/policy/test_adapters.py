"""LoRA adapters as results and as models to start from."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from cwpo_trainer.commands import Align, Evaluate, Sft
from cwpo_trainer.evaluation.policies import named_models
from cwpo_trainer.run.folder import last_checkpoint, read_lines, read_record

from ..samples import pairs, weighted, write_lines
from ..stopping import stopped_after

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def flags(tmp_path):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    return (
        *("--data", data, "--batch-size", 8, "--gradient-accumulation", 1, "--dtype", "float32"),
        *("--max-steps", 2, "--learning-rate", 1e-2, "--threads", 1),
    )


@pytest.fixture
def sft(flags, tiny_causal, tmp_path, command):
    """The folder of an SFT adapter, which has moved far from its base model."""
    more = ("--lora", "--lora-rank", 4, "--adapter-only", "--learning-rate", 3e-2)
    command(Sft, *flags, "--model", tiny_causal, *more, "--output", tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def merged(sft, tiny_causal, tmp_path):
    """The same as a plain model in float32, merged by PEFT itself."""
    base = AutoModelForCausalLM.from_pretrained(tiny_causal)
    PeftModel.from_pretrained(base, sft).merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(sft).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 40)[None]).logits.float()


def steps(folder):
    return read_lines(folder / "training.jsonl")


def test_the_adapter_is_kept_beside_the_merged_model(flags, tiny_causal, tmp_path, command):
    out = tmp_path / "out"
    command(Align, *flags, "--model", tiny_causal, "--lora", "--output", out)
    names = {path.name for path in (out / "adapter").iterdir()}
    assert {"adapter_config.json", WEIGHTS, "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    base = AutoModelForCausalLM.from_pretrained(tiny_causal)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, out / "adapter"))
    assert (adapted - before).abs().max() > 1e-3
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    # float32 holds it all.
    assert read_record(out).results["update_lost_in_merging"] == 0
    # Whoever may read the record may read the weights: containers run as another user.
    for weights in (out / "model.safetensors", out / "adapter" / WEIGHTS):
        assert weights.stat().st_mode == (out / "run.json").stat().st_mode


def test_merging_says_what_rounding_loses(flags, tiny_causal, tmp_path, command, capsys):
    start = tmp_path / "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.bfloat16)
    model.save_pretrained(start)
    AutoTokenizer.from_pretrained(tiny_causal).save_pretrained(start)
    lost, moved = {}, {}
    for name, rate in (("small", 1e-6), ("large", 1.0)):
        out = tmp_path / name
        more = ("--model", start, "--lora", "--warmup-steps", 0, "--learning-rate", rate)
        command(Sft, *flags, *more, "--output", out)
        said = capsys.readouterr().err
        lost[name] = read_record(out).results["update_lost_in_merging"]
        assert f"into bfloat16 weights lost {lost[name]:.1%} of its update" in said
        assert ("--adapter-only" in said) == (name == "small")
        wanted = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        wanted = PeftModel.from_pretrained(wanted, out / "adapter").merge_and_unload().state_dict()
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
        differences = [
            (wanted[at] - found[at].float(), wanted[at] - model.state_dict()[at].float())
            for at in wanted
        ]
        norms = [
            torch.cat([part.flatten() for part in of]).norm()
            for of in zip(*differences, strict=True)
        ]
        assert lost[name] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-4)
        moved[name] = norms[1]
    assert moved["small"] > 0
    assert lost["small"] > 0.9
    assert 0 < lost["large"] < 0.1


def test_the_adapter_may_be_all(sft, tiny_causal):
    names = {path.name for path in sft.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "run.json", "generation_config.json"} <= names
    assert not {"config.json", "model.safetensors", "adapter", "ref"} & names
    config = json.loads((sft / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_causal.resolve())
    assert AutoTokenizer.from_pretrained(sft).chat_template is not None
    assert GenerationConfig.from_pretrained(sft).eos_token_id
    assert "update_lost_in_merging" not in read_record(sft).results


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--precompute-reference",), ("--no-share-prompts",)])
def test_alignment_goes_on_with_an_adapter(more, sft, merged, flags, tmp_path, command):
    command(Align, *flags, *more, "--model", sft, "--lora", "--output", tmp_path / "on")
    command(Align, *flags, *more, "--model", merged, "--lora", "--output", tmp_path / "anew")
    on, anew = steps(tmp_path / "on"), steps(tmp_path / "anew")
    # Policy and reference both start where SFT ended.
    assert on[0]["unweighted_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert on[0]["logps/chosen"] == pytest.approx(anew[0]["logps/chosen"], abs=1e-3)
    assert on[-1]["rewards/margins"] > 0
    assert read_record(tmp_path / "on").settings["lora_rank"] == 4
    config = json.loads((tmp_path / "on" / "adapter" / "adapter_config.json").read_text())
    before = json.loads((sft / "adapter_config.json").read_text())
    assert config["r"] == 4
    # It is an adapter of the same base model, and holds what both trainings have done.
    assert config["base_model_name_or_path"] == before["base_model_name_or_path"]
    assert not (tmp_path / "on" / "adapter" / "ref").exists()
    base = AutoModelForCausalLM.from_pretrained(before["base_model_name_or_path"])
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "on" / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "on"))
    torch.testing.assert_close(found, adapted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_reference_cache_knows_adapters(sft, flags, tiny_causal, tmp_path, command):
    more = (*flags, "--reference-cache", tmp_path / "cache", "--lora")
    of_start = (*more, "--model", sft)
    found = {}
    for name, run in (
        ("first", of_start),
        ("again", (*of_start, "--seed", 1)),
        ("base", (*more, "--model", tiny_causal)),
        ("named", (*more, "--model", tiny_causal, "--reference", sft)),
        ("named again", (*more, "--model", tiny_causal, "--reference", sft)),
    ):
        command(Align, *run, "--output", tmp_path / name)
        found[name] = read_record(tmp_path / name).results["pairs_from_reference_cache"]
    assert found == {"first": 0, "again": 16, "base": 0, "named": 0, "named again": 16}
    rewards = [steps(tmp_path / name)[0]["rewards/chosen"] for name in ("named", "named again")]
    assert rewards[0] == rewards[1] != 0


@pytest.mark.slow
def test_sft_goes_on_with_an_adapter(sft, merged, flags, tmp_path, command):
    flags = (*flags, "--lora", "--lora-dropout", 0)
    command(Sft, *flags, "--model", sft, "--adapter-only", "--output", tmp_path / "on")
    command(Sft, *flags, "--model", merged, "--output", tmp_path / "anew")
    on, anew = steps(tmp_path / "on"), steps(tmp_path / "anew")
    assert on[0]["loss"] == pytest.approx(anew[0]["loss"], rel=1e-4)
    assert on[-1]["loss"] < on[0]["loss"]


@pytest.mark.slow
def test_all_weights_of_an_adapted_model_can_be_trained(sft, merged, flags, tmp_path, command):
    for name, start in (("adapter", sft), ("model", merged)):
        command(Align, *flags, "--model", start, "--output", tmp_path / f"of-{name}")
    left, right = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"of-{name}").state_dict()
        for name in ("adapter", "model")
    )
    start = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=0, atol=1e-4)
    assert not torch.equal(left["lm_head.weight"], start["lm_head.weight"])


@pytest.mark.slow
def test_an_adapter_can_be_the_reference(sft, merged, flags, tiny_causal, tmp_path, command):
    for name, reference in (("adapter", sft), ("model", merged)):
        more = ("--model", tiny_causal, "--reference", reference, "--lora")
        command(Align, *flags, *more, "--output", tmp_path / name)
    left, right = steps(tmp_path / "adapter"), steps(tmp_path / "model")
    for one, other in zip(left, right, strict=True):
        assert one["rewards/chosen"] == pytest.approx(other["rewards/chosen"], abs=1e-3)
    assert abs(left[0]["rewards/chosen"]) > 0.01


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_adapter(sft, flags, tmp_path, command):
    more = (*flags, "--model", sft, "--lora", "--adapter-only", "--max-steps", 12)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    partial = tmp_path / ".stopped.partial"
    stopped_after(2, partial / "training.jsonl", "cwpo_trainer.align", *more, "--output", stopped)
    assert last_checkpoint(partial) is not None
    command(Align, *more, "--output", stopped, "--resume")
    command(Align, *more, "--output", whole)
    assert [line["loss"] for line in steps(stopped)] == [line["loss"] for line in steps(whole)]
    assert (stopped / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_policies_that_are_adapters_are_evaluated(
    sft, merged, tiny_causal, tiny_annotator, tmp_path, command
):
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(8, seed=9))
    command(
        Evaluate,
        "policy",
        *(sft, merged, "--reference", tiny_causal, "--judge", tiny_annotator, "--data", held_out),
        *("--output", tmp_path / "evaluation"),
        *("--prompts", 4, "--max-new-tokens", 6, "--batch-size", 4, "--temperature", 0),
    )
    found = read_record(tmp_path / "evaluation").results["policies"]
    for name in ("preference_accuracy", "implicit_margin", "win_share", "mean_score"):
        assert found["sft"][name] == pytest.approx(found["merged"][name], abs=1e-4), name
    assert abs(found["sft"]["implicit_margin"]) > 1e-3


def test_an_adapter_beside_a_merged_model_has_a_name_of_its_own():
    paths = ["runs/cw-dpo", "runs/cw-dpo/adapter/", "runs/dpo/adapter"]
    assert [*named_models(paths)] == ["cw-dpo", "cw-dpo/adapter", "dpo/adapter"]


def test_an_adapter_can_be_planned_with(sft, flags, tmp_path, command, capsys):
    command(Align, *flags, "--model", sft, "--lora", "--output", tmp_path / "on", "--dry-run")
    assert "parameters" in capsys.readouterr().out


def test_another_rank_than_the_adapters_is_refused(sft, flags, tmp_path, failure):
    flags = (*flags, "--model", sft, "--output", tmp_path / "out", "--lora")
    message = failure(Align, *flags, "--lora-rank", 16)
    assert "--lora-rank 16" in message
    assert "has 4; leave --lora-rank out" in message


def test_an_adapter_alone_needs_one(flags, tiny_causal, tmp_path, failure):
    flags = (*flags, "--model", tiny_causal, "--output", tmp_path / "out")
    assert "add --lora" in failure(Align, *flags, "--adapter-only")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3; policies can be LoRA ones only"),
        ({"base_model_name_or_path": "/nowhere"}, "the adapter's base model: /nowhere"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_one_line(change, message, sft, flags, tmp_path, failure):
    config = json.loads((sft / "adapter_config.json").read_text())
    if "peft_type" in change:
        config = {name: config[name] for name in ("base_model_name_or_path", "task_type")}
    (sft / "adapter_config.json").write_text(json.dumps(config | change))
    flags = (*flags, "--model", sft, "--output", tmp_path / "out")
    assert message in failure(Align, *flags)


@pytest.fixture
def experts(tiny_tokenizer, tmp_path):
    """The folder of a random mixture of experts."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tiny_tokenizer.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


@pytest.mark.parametrize(("kind", "more"), [(Align, ()), (Sft, ("--lora-dropout", 0))])
def test_adapters_of_experts_are_merged(kind, more, experts, flags, tmp_path, command):
    out = tmp_path / "out"
    command(kind, *flags, "--model", experts, "--lora", *more, "--output", out)
    base = AutoModelForCausalLM.from_pretrained(experts)
    before = dict(base.named_parameters())
    merged = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    for name, weight in merged.items():
        is_adapted = any(part in name for part in ("experts", "gate.weight", "self_attn"))
        assert torch.equal(weight, before[name]) != is_adapted, name
    adapted = logits(PeftModel.from_pretrained(base, out / "adapter"))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), adapted, rtol=0, atol=1e-5
    )


def test_adapters_of_experts_have_no_dropout(experts, flags, tmp_path, failure, command):
    message = failure(Sft, *flags, "--model", experts, "--lora", "--output", tmp_path / "out")
    reason = "adapters of a mixture of experts have no dropout; give --lora-dropout 0"
    assert message.endswith(f"--lora-dropout 0.05: {reason}")
    # As little when one is trained further.
    more = ("--lora", "--lora-dropout", 0, "--adapter-only")
    command(Sft, *flags, "--model", experts, *more, "--output", tmp_path / "sft")
    further = ("--model", tmp_path / "sft", "--lora", "--output", tmp_path / "further")
    assert reason in failure(Sft, *flags, *further)
