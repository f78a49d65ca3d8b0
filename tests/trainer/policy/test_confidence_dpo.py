from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

from cwpo.errors import ConfigError, DatasetError
from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer

PAIRS = [
    ("hello how are you", " I am good thanks", " no"),
    ("why is the water cold", " because it is", " what do you think people like about it"),
    ("please help me", " Sure I can help you with that", " go away now"),
    ("say a number", " two", " the long day"),
    ("who made this", " people did", " some one"),
    ("are you safe", " yes", " no you are bad and rude"),
    ("is the cat kind", " she is very kind", " she is"),
    ("do you know her", " I do not", " sorry"),
]
WEIGHTS = [0.9, 0.05, 0.4, 0.0, 0.7, 0.31, 1.0, 0.2]


def dataset(weights=WEIGHTS, **columns) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [pair[0] for pair in PAIRS][: len(weights)],
            "chosen": [pair[1] for pair in PAIRS][: len(weights)],
            "rejected": [pair[2] for pair in PAIRS][: len(weights)],
            "confidence": weights,
            **columns,
        }
    )


def options(folder, **overrides):
    return (
        dict(
            output_dir=str(folder),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            beta=0.5,
            seed=3,
        )
        | overrides
    )


def build(kind, config, folder, model_folder, tokenizer, data, *, shifted=True, lora=None, **more):
    """A trainer on the tiny model; `shifted` moves the policy off its reference first."""
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    reference = None if lora else copy.deepcopy(policy)
    if shifted:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return kind(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=data,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=lora,
        **more,
    )


def batch_of(trainer, rows=None):
    data = trainer.train_dataset
    return trainer.data_collator([data[i] for i in (rows or range(len(data)))])


def gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


LOSSES = [("sigmoid", {}), ("hinge", {}), ("ipo", {}), ("robust", {"label_smoothing": 0.2})]


def assert_same_gradient(actual, expected, tolerance=1e-4):
    """Each tensor's, relative to its norm."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm()
        assert difference <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("loss", "extra"), LOSSES)
def test_weight_one_is_trls_own_loss(loss, extra, shared, tiny_causal, tiny_tokenizer, tmp_path):
    arguments = options(tmp_path, loss_type=loss, **extra)
    data = dataset([1.0] * 8)
    theirs = build(DPOTrainer, DPOConfig(**arguments), tmp_path, tiny_causal, tiny_tokenizer, data)
    config = ConfidenceDPOConfig(**arguments, share_prompts=shared)
    ours = build(ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, data)
    assert (ours.unpacked_because is None) == shared
    loss_theirs, gradient_theirs = gradients(theirs, batch_of(theirs))
    loss_ours, gradient_ours = gradients(ours, batch_of(ours))
    if not shared:
        assert loss_ours.item() == loss_theirs.item()
    assert loss_ours.item() == pytest.approx(loss_theirs.item(), rel=1e-5)
    assert_same_gradient(gradient_ours, gradient_theirs, 1e-4 if shared else 1e-6)


class _ScaleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, scale):
        ctx.save_for_backward(scale)
        return log_probs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0][:, None], None


class _Oracle(torch.nn.Module):
    """A model whose log-probabilities let back only c times the gradient, row by row."""

    def __init__(self, model, scale):
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, *args, **kwargs):
        outputs = self.model(*args, **kwargs)
        outputs.log_probs = _ScaleBackward.apply(outputs.log_probs, self.scale)
        return outputs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("loss", "extra"), LOSSES)
def test_gradient_is_the_mean_of_weighted_gradients(
    loss, extra, shared, tiny_causal, tiny_tokenizer, tmp_path
):
    arguments = options(tmp_path, loss_type=loss, **extra)
    theirs = build(
        DPOTrainer, DPOConfig(**arguments), tmp_path, tiny_causal, tiny_tokenizer, dataset()
    )
    ours = build(
        ConfidenceDPOTrainer,
        ConfidenceDPOConfig(**arguments, share_prompts=shared),
        tmp_path,
        tiny_causal,
        tiny_tokenizer,
        dataset(),
    )
    _, actual = gradients(ours, batch_of(ours))
    theirs.model.train()
    oracle = _Oracle(theirs.model, torch.tensor(WEIGHTS * 2))
    theirs.compute_loss(oracle, batch_of(theirs)).backward()
    expected = {name: p.grad for name, p in theirs.model.named_parameters() if p.grad is not None}
    assert_same_gradient(actual, expected, 1e-4 if shared else 2e-5)


def test_ipo_can_sum_its_log_ratios(tiny_causal, tiny_tokenizer, tmp_path):
    losses = {}
    for normalised in (True, False):
        config = ConfidenceDPOConfig(
            **options(tmp_path, loss_type="ipo"), ipo_length_normalised=normalised
        )
        trainer = build(
            ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, dataset()
        )
        losses[normalised] = gradients(trainer, batch_of(trainer))[0].item()
    assert abs(losses[True] - losses[False]) > 1e-3


def trained(folder, model_folder, tokenizer, data, *, lora=None, **overrides):
    config = ConfidenceDPOConfig(**options(folder, **overrides))
    trainer = build(
        ConfidenceDPOTrainer,
        config,
        folder,
        model_folder,
        tokenizer,
        data,
        shifted=False,
        lora=lora,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return trainer, before, after


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_a_batch_of_zero_weights_moves_nothing(tiny_causal, tiny_tokenizer, tmp_path):
    config = ConfidenceDPOConfig(**options(tmp_path, weight_decay=0.0))
    trainer = build(ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, dataset())
    zero = batch_of(trainer, [3, 3, 3, 3])
    _, gradient = gradients(trainer, zero)
    trainer.create_optimizer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer.step()
    assert gradient
    assert moved(before, dict(trainer.model.named_parameters())) == []


def test_a_zero_weight_only_dilutes_the_batch(tiny_causal, tiny_tokenizer, tmp_path):
    config = ConfidenceDPOConfig(**options(tmp_path))
    trainer = build(ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, dataset())
    with_zero = gradients(trainer, batch_of(trainer, [0, 1, 2, 3]))
    without = gradients(trainer, batch_of(trainer, [0, 1, 2]))
    torch.testing.assert_close(with_zero[0], without[0] * 3 / 4)
    for name, gradient in without[1].items():
        torch.testing.assert_close(with_zero[1][name], gradient * 3 / 4, rtol=1e-4, atol=1e-7)


def test_training_moves_every_weight(tiny_causal, tiny_tokenizer, tmp_path):
    _, before, after = trained(tmp_path, tiny_causal, tiny_tokenizer, dataset(), max_steps=2)
    assert set(moved(before, after)) == set(before)


@pytest.mark.slow
def test_one_large_batch_follows_many_small_ones(tiny_causal, tiny_tokenizer, tmp_path):
    # SGD shows a wrong scale of the gradient, which Adam would hide.
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        _, _, after = trained(
            tmp_path,
            tiny_causal,
            tiny_tokenizer,
            dataset(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            optim="sgd",
            learning_rate=0.5,
            train_sampling_strategy="sequential",
        )
        runs.append(after)
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-4, atol=1e-6)


def test_the_weight_stays_with_its_pair(tiny_causal, tiny_tokenizer, tmp_path):
    data = dataset(note=[f"pair {i}" for i in range(8)])
    data = data.filter(lambda row: row["confidence"] != 0.4).shuffle(seed=5).select(range(6))
    by_prompt = dict(zip([pair[0] for pair in PAIRS], WEIGHTS, strict=True))
    config = ConfidenceDPOConfig(**options(tmp_path))
    trainer = build(ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, data)
    seen = []
    for batch in trainer.get_train_dataloader():
        for row, weight in enumerate(batch["pair_weight"].tolist()):
            mask = batch["attention_mask"][row].bool() & ~batch["completion_mask"][row].bool()
            prompt = tiny_tokenizer.decode(batch["input_ids"][row][mask])
            assert math.isclose(weight, by_prompt[prompt], rel_tol=1e-6)
            seen.append(prompt)
    assert sorted(seen) == sorted(data["prompt"])


@pytest.mark.slow
def test_precomputed_references_train_alike(tiny_causal, tiny_tokenizer, tmp_path):
    runs = [
        trained(
            tmp_path,
            tiny_causal,
            tiny_tokenizer,
            dataset(),
            max_steps=3,
            precompute_ref_log_probs=precompute,
        )[2]
        for precompute in (False, True)
    ]
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "sigmoid"])
def test_losses_without_a_reference_load_and_run_none(loss, tiny_causal, tiny_tokenizer, tmp_path):
    start = shutil.copytree(tiny_causal, tmp_path / "start")
    policy = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    config = ConfidenceDPOConfig(**options(tmp_path / "out", loss_type=loss))
    more = dict(args=config, train_dataset=dataset(), processing_class=tiny_tokenizer)
    shutil.rmtree(start)
    if loss == "sigmoid":
        with pytest.raises(OSError, match="start"):
            ConfidenceDPOTrainer(model=policy, **more)
        return
    trainer = ConfidenceDPOTrainer(model=policy, **more)
    passes = []
    policy.register_forward_hook(lambda *_: passes.append(1))
    gradients(trainer, batch_of(trainer))
    assert len(passes) == 1
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert trainer.evaluate(dataset())["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_rewards_without_a_reference_are_of_mean_log_probs(
    loss, tiny_causal, tiny_tokenizer, tmp_path
):
    config = ConfidenceDPOConfig(**options(tmp_path, loss_type=loss, beta=2.0))
    data = dataset().select([0])
    trainer = build(
        ConfidenceDPOTrainer, config, tmp_path, tiny_causal, tiny_tokenizer, data, eval_dataset=data
    )
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    counts = batch_of(trainer)["completion_mask"].sum(dim=1).tolist()
    rewards = [
        2.0 * logged[f"eval_logps/{of}"] / tokens
        for of, tokens in zip(("chosen", "rejected"), counts, strict=True)
    ]
    assert logged["eval_rewards/chosen"] == pytest.approx(rewards[0])
    assert logged["eval_rewards/rejected"] == pytest.approx(rewards[1])
    assert logged["eval_rewards/margins"] == pytest.approx(rewards[0] - rewards[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_evaluation_weights_its_pairs(precompute, tiny_causal, tiny_tokenizer, tmp_path):
    config = ConfidenceDPOConfig(**options(tmp_path, precompute_ref_log_probs=precompute))
    trainer = build(
        ConfidenceDPOTrainer,
        config,
        tmp_path,
        tiny_causal,
        tiny_tokenizer,
        dataset(),
        eval_dataset=dataset(),
    )
    at_init = trainer.evaluate()["eval_loss"]
    by_hand = trainer.evaluate(dataset())["eval_loss"]
    unweighted = trainer.evaluate(dataset([1.0] * 8))["eval_loss"]
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    assert at_init == pytest.approx(expected, rel=1e-5)
    assert by_hand == pytest.approx(expected, rel=1e-5)
    assert unweighted != pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_lora_trains_the_adapter_against_the_start_model(tiny_causal, tiny_tokenizer, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, before, after = trained(
        tmp_path, tiny_causal, tiny_tokenizer, dataset(), lora=lora, max_steps=4
    )
    changed = moved(before, after)
    assert changed
    assert all("lora_" in name for name in changed)
    first, last = (trainer.state.log_history[i] for i in (0, 3))
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(last["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    "bad",
    [
        {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"padding_free": True},
        {"loss_type": ["sigmoid", "ipo"]},
        {"loss_type": "exo_pair"},
        {"loss_weights": [1.0]},
        {"label_smoothing": 0.1},
        {"loss_type": "robust", "label_smoothing": 0.5},
        {"loss_type": "ipo", "beta": 0.0},
        {"loss_type": "simpo", "simpo_gamma": -0.1},
    ],
)
def test_options_that_would_be_ignored_are_refused(bad, tmp_path):
    with pytest.raises(ConfigError, match=list(bad)[-1]):
        ConfidenceDPOConfig(**options(tmp_path, **bad))


@pytest.fixture(scope="module")
def experts(tiny_tokenizer, tmp_path_factory):
    """A tiny model whose experts are to be balanced, strongly enough to see it."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        router_aux_loss_coef=0.3,
        initializer_range=0.3,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_balance_of_experts_is_trls(experts, tiny_tokenizer, tmp_path):
    models = (tmp_path, experts, tiny_tokenizer, dataset([1.0] * 8))
    theirs = build(DPOTrainer, DPOConfig(**options(tmp_path)), *models)
    ours = build(ConfidenceDPOTrainer, ConfidenceDPOConfig(**options(tmp_path)), *models)
    assert "mixture of experts" in ours.unpacked_because
    loss_theirs, gradient_theirs = gradients(theirs, batch_of(theirs))
    loss_ours, gradient_ours = gradients(ours, batch_of(ours))
    assert loss_ours.item() == pytest.approx(loss_theirs.item(), rel=1e-6)
    assert_same_gradient(gradient_ours, gradient_theirs, 1e-6)


def test_no_weight_multiplies_the_balance_of_experts(experts, tiny_tokenizer, tmp_path):
    """Of a step of two batches it is the mean, over their pairs."""
    models = (tmp_path, experts, tiny_tokenizer, dataset([1e-9] * 6))
    config = ConfidenceDPOConfig(**options(tmp_path))
    trainer = build(ConfidenceDPOTrainer, config, *models)
    found = [0.3 * aux_loss(trainer, rows) for rows in (range(4), range(4, 6))]
    parts = [
        trainer.compute_loss(trainer.model, batch_of(trainer, rows), num_items_in_batch=6).item()
        for rows in (range(4), range(4, 6))
    ]
    assert found[0] != pytest.approx(found[1], rel=1e-3)
    assert sum(parts) == pytest.approx((4 * found[0] + 2 * found[1]) / 6, rel=1e-5)


def aux_loss(trainer, rows):
    """As transformers computes it of a batch."""
    batch = batch_of(trainer, rows)
    names = ("input_ids", "attention_mask")
    inputs = {name: batch[name] for name in names}
    with torch.no_grad():
        return trainer.model(**inputs, output_router_logits=True).aux_loss.item()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, float("nan")], "pair 2 has the weight nan"),
        ([0.5, -0.1], "pair 2"),
        ([0.0, 0.0], "every weight is 0"),
    ],
)
def test_unusable_weights_are_refused(weights, message, tiny_causal, tiny_tokenizer, tmp_path):
    with pytest.raises(DatasetError, match=message):
        build(
            ConfidenceDPOTrainer,
            ConfidenceDPOConfig(**options(tmp_path)),
            tmp_path,
            tiny_causal,
            tiny_tokenizer,
            dataset(weights),
        )


def test_a_dataset_without_weights_is_refused(tiny_causal, tiny_tokenizer, tmp_path):
    with pytest.raises(DatasetError, match="no column 'confidence'"):
        build(
            ConfidenceDPOTrainer,
            ConfidenceDPOConfig(**options(tmp_path)),
            tmp_path,
            tiny_causal,
            tiny_tokenizer,
            dataset().remove_columns("confidence"),
        )
