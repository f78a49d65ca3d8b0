"""`--set`: arguments of TRL's trainers that no flag has."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from cwpo_trainer.commands import Align, Sft
from cwpo_trainer.run.folder import read_lines, read_record

from ..samples import weighted, write_lines

UNREAD = ("--model", "unread", "--data", "unread.jsonl", "--output", "unwritten")


@pytest.fixture
def flags(tiny_causal, tmp_path):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(24))
    return (
        *("--model", tiny_causal, "--data", data, "--dtype", "float32", "--threads", 1),
        *("--batch-size", 4, "--gradient-accumulation", 1, "--max-steps", 3),
        *("--learning-rate", 1e-2),
    )


def moved(output, start):
    """How far the weights are from the start."""
    ended, began = (load_file(folder / "model.safetensors") for folder in (output, start))
    return max(float((ended[name] - began[name]).abs().max()) for name in began)


@pytest.mark.parametrize("kind", [Sft, Align])
def test_what_is_set_reaches_the_trainer(kind, flags, tiny_causal, tmp_path, command):
    # AdamW's step is the rate times m / (sqrt(v) + epsilon): with such an epsilon, almost nothing.
    command(kind, *flags, "--output", tmp_path / "as-ever", "--weight-decay", 0)
    more = ("--weight-decay", 0, "--set", "adam_epsilon=1e9", "--set", "adam-beta1=0.8")
    command(kind, *flags, "--output", tmp_path / "set", *more)
    assert moved(tmp_path / "as-ever", tiny_causal) > 1e-3
    assert moved(tmp_path / "set", tiny_causal) < 1e-6
    assert read_record(tmp_path / "as-ever").settings["set"] == {}
    recorded = read_record(tmp_path / "set").settings["set"]
    assert recorded == {"adam_epsilon": 1e9, "adam_beta1": 0.8}


def test_a_file_is_a_mapping_whose_names_flags_override(flags, tmp_path, command):
    (tmp_path / "sft.yaml").write_text(
        "set:\n  adam_beta1: 0.8\n  adam_beta2: 0.9\n  dataloader_num_workers: 1\n"
        "  activation_checkpointing_kwargs: {use_reentrant: true, preserve_rng_state: true}\n"
    )
    config = ("--config", tmp_path / "sft.yaml", "--set", "adam_beta2=0.95")
    command(Sft, *flags, *config, "--output", tmp_path / "out")
    assert read_record(tmp_path / "out").settings["set"] == {
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "dataloader_num_workers": 1,
        "activation_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": True},
    }


def test_values_are_read_as_their_types(flags, tmp_path, command):
    kwargs = {"use_reentrant": False, "preserve_rng_state": True}
    command(
        Align,
        *(*flags, "--output", tmp_path / "out", "--max-steps", 1),
        *("--set", f"activation_checkpointing_kwargs={json.dumps(kwargs)}"),
        *("--set", "adam_epsilon=1e-7", "--set", "data_seed=3", "--set", "run_name=a=b,c"),
        *("--set", "logging_first_step=true", "--set", "dataloader_prefetch_factor=null"),
    )
    assert read_record(tmp_path / "out").settings["set"] == {
        "activation_checkpointing_kwargs": kwargs,
        "adam_epsilon": 1e-7,
        "data_seed": 3,
        "run_name": "a=b,c",
        "logging_first_step": True,
        "dataloader_prefetch_factor": None,
    }


@pytest.mark.parametrize("kind", [Sft, Align])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adam_beta3=0.9", "no such argument; the closest: adam_beta"),
        ("learnign_rate=1", "no such argument; the closest: learning_rate"),
        ("adam_beta2=high", "--set adam_beta2: Input should be a valid number"),
        ("adam_beta2=true", "--set adam_beta2: Input should be a valid number"),
        ("data_seed=1.5", "--set data_seed: Input should be a valid integer"),
        ("adam_beta2", "--set adam_beta2: write NAME=VALUE"),
        ("learning_rate=1", "--set learning_rate: use --learning-rate"),
        ("per_device_train_batch_size=1", "use --batch-size"),
        ("bf16=true", "use --dtype"),
        ("optim=adafactor", "use --optimizer"),
        ("output_dir=x", "use --output"),
        ("max_length=3", "use --max-length"),
        ("share_prompts=false", "use --share-prompts"),
        ("deepspeed=x.json", "use --sharding"),
        ("packing=true", "DATA is tokenised before"),
        ("remove_unused_columns=true", "DATA is tokenised before"),
        ("trust_remote_code=true", "the model is loaded before"),
        ("save_only_model=true", "a run that is resumed would not end as"),
        ("hub_token=secret", "only the finished model is uploaded"),
        ("logging_nan_inf_filter=true", "a loss of NaN ends the run"),
        ("pad_to_multiple_of=8", "add --no-share-prompts"),
    ],
)
def test_what_would_be_without_effect_or_break_the_run_is_refused(kind, given, message, failure):
    assert message in failure(kind, *UNREAD, "--set", given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss_type=ipo", "use --loss"),
        ("beta=0.1", "use --beta"),
        ("label_smoothing=0.1", "use --epsilon"),
        ("precompute_ref_log_probs=true", "use --precompute-reference"),
        ("weight_column=x", "use --weight"),
        ("use_weighting=true", "the loss here does not read it"),
        ("sync_ref_model=true", "a run that is resumed would not end as"),
        ("neftune_noise_alpha=5", "compared without noise"),
        ("shuffle_dataset=true", "no such argument"),
    ],
)
def test_alignment_refuses_more(given, message, failure):
    assert message in failure(Align, *UNREAD, "--set", given)


def test_the_loss_of_sft_is_none_to_choose(failure):
    assert "the loss here does not read it" in failure(Sft, *UNREAD, "--set", "loss_type=dft")


def test_values_that_do_not_go_together_are_one_line(flags, tmp_path, failure):
    given = ("--set", "dataloader_prefetch_factor=2", "--set", "adam_beta2=0.9")
    message = failure(Sft, *flags, "--output", tmp_path / "out", *given)
    assert message.startswith("cwpo Sft: --set dataloader_prefetch_factor, adam_beta2: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_noise_on_embeddings_is_for_padded_texts(flags, tmp_path, command):
    padded = ("--no-share-prompts", "--set", "neftune_noise_alpha=50")
    losses = []
    for name, more in (("without", ()), ("with", padded)):
        command(Sft, *flags, *more, "--output", tmp_path / name, "--max-steps", 1)
        losses.append(read_lines(tmp_path / name / "training.jsonl")[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_resume_compares_what_is_set(flags, tmp_path, failure):
    output = tmp_path / "out"
    broken = (*flags, "--learning-rate", 1e30, "--save-steps", 1, "--output", output)
    assert "the loss became" in failure(Align, *broken, "--set", "adam_beta2=0.9")
    message = failure(Align, *broken, "--set", "adam_beta2=0.95", "--resume")
    assert "--resume: set was {'adam_beta2': 0.9}" in message
