"""What TRL asks of its DPOTrainer, asked of ours with all weights 1."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cohere2Config,
    GptOssConfig,
    Lfm2Config,
    Olmo3Config,
    Qwen2Config,
    Qwen3MoeConfig,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from cwpo.errors import ConfigError, DatasetError
from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer

from .test_confidence_dpo import (
    PAIRS,
    assert_same_gradient,
    batch_of,
    build,
    dataset,
    gradients,
    moved,
    options,
)

ONES = [1.0] * len(PAIRS)


@pytest.fixture
def ours(tiny_causal, tmp_path):
    """Builds our trainer by the name of a model, as TRL's users do."""

    def make(data=None, *, kwargs=(), **overrides):
        config = ConfidenceDPOConfig(**options(tmp_path, **overrides))
        more = dict(model=str(tiny_causal)) | dict(kwargs)
        return ConfidenceDPOTrainer(args=config, train_dataset=data or dataset(ONES), **more)

    return make


@pytest.fixture
def both(tiny_causal, tiny_tokenizer, tmp_path):
    """Loss and gradient of our trainer and of TRL's, on a policy that has left its reference."""

    def found(data=None, *, folder=None, tokenizer=None, lora=None, **overrides):
        result = []
        for kind, config in (
            (ConfidenceDPOTrainer, ConfidenceDPOConfig),
            (DPOTrainer, DPOConfig),
        ):
            trainer = build(
                kind,
                config(**options(tmp_path, **overrides)),
                tmp_path,
                folder or tiny_causal,
                tokenizer or tiny_tokenizer,
                data or dataset(ONES),
                lora=copy.deepcopy(lora),
            )
            draw = torch.Generator().manual_seed(2)
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad and lora is not None and "ref" not in name:
                    weight.data.add_(torch.randn(weight.shape, generator=draw), alpha=0.05)
            result.append((trainer, *gradients(trainer, batch_of(trainer))))
        return result

    return found


def assert_same(found, tolerance=1e-4):
    (ours, our_loss, our_gradient), (_, loss, gradient) = found
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(our_gradient, gradient, tolerance)
    return ours


def weights_of(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


SMALL = dict(
    vocab_size=600,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Cohere2Config(**SMALL, head_dim=8, sliding_window=8), "log-probabilities would be"),
        (GptOssConfig(**SMALL, **EXPERTS, num_local_experts=4), "mixture of experts"),
        (GptOssConfig(**SMALL, **EXPERTS, num_local_experts=4, router_aux_loss_coef=0.0), "states"),
        (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "states would be others"),
        (Olmo3Config(**SMALL, sliding_window=8), None),
        (Qwen2Config(**SMALL, tie_word_embeddings=True), None),
        (Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4), "mixture of experts"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_architectures_have_trls_gradient(config, reason, both, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    trainer = assert_same(both(folder=tmp_path / "model"))
    if reason is None:
        assert trainer.unpacked_because is None
    else:
        assert reason in trainer.unpacked_because


def chat(role, text):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("is_implicit", [False, True])
def test_every_form_of_a_dataset_is_read_as_trl_reads_it(is_chat, is_implicit, both):
    written = chat if is_chat else lambda role, text: text
    rows = []
    for texts in PAIRS:
        prompt, chosen, rejected = map(written, ("user", "assistant", "assistant"), texts)
        if is_implicit:
            rows.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    # Columns of other names change nothing.
    data = Dataset.from_list([row | {"confidence": 1.0, "source": "x"} for row in rows])
    found = both(data)
    trainer = assert_same(found)
    assert trainer.unpacked_because is None
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[name][:] == found[1][0].train_dataset[name][:]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_are_in_the_prompt(as_json, both, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + (
        tokenizer.chat_template
    )
    tools = [{"name": "calculator"}]
    rows = [
        {
            "prompt": chat("user", prompt),
            "chosen": chat("assistant", chosen),
            "rejected": chat("assistant", rejected),
            "tools": json.dumps(tools) if as_json else tools,
            "confidence": 1.0,
        }
        for prompt, chosen, rejected in PAIRS
    ]
    trainer = assert_same(both(Dataset.from_list(rows), tokenizer=tokenizer))
    assert "calculator" in tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])


def test_a_template_gets_the_arguments_of_a_row(ours, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ 'loud ' if loud }}" + tokenizer.chat_template
    rows = [
        {
            "prompt": chat("user", prompt),
            "chosen": chat("assistant", chosen),
            "rejected": chat("assistant", rejected),
            "chat_template_kwargs": {"loud": bool(at % 2)},
            "confidence": 1.0,
        }
        for at, (prompt, chosen, rejected) in enumerate(PAIRS)
    ]
    trainer = ours(Dataset.from_list(rows), kwargs={"processing_class": tokenizer})
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in trainer.train_dataset]
    assert [prompt.startswith("loud ") for prompt in prompts] == [False, True] * 4


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_long_texts_are_cut_as_in_trl(mode, both):
    assert assert_same(both(max_length=12, truncation_mode=mode)).unpacked_because is None


def test_a_pair_that_cutting_leaves_no_response_of_is_dropped_with_its_weight(ours):
    long = "what about the water number " * 4
    data = dataset([0.25, 0.5, 0.75], prompt=["who", long, "why"])
    trainer = ours(data, max_length=12, truncation_mode="keep_start")
    assert trainer.train_dataset["confidence"][:] == [0.25, 0.75]


def test_padding_with_eos_changes_nothing(both, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert_same(both(tokenizer=tokenizer))


ALL = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
HEAD = "its hidden states would be others"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        (LoraConfig(**ALL), None),
        (LoraConfig(**ALL, use_rslora=True), None),
        (LoraConfig(**ALL, use_dora=True), None),
        (LoraConfig(**ALL | {"target_modules": ["q_proj"]}, layers_to_transform=[1]), None),
        (LoraConfig(**ALL, modules_to_save=["norm"]), None),
        (LoraConfig(**ALL, modules_to_save=["lm_head"]), HEAD),
        (LoraConfig(**ALL | {"target_modules": ["q_proj", "embed_tokens"]}), None),
        (IA3Config(task_type="CAUSAL_LM"), None),
    ],
    ids=["lora", "rslora", "dora", "layer", "norm", "head", "embeddings", "ia3"],
)
def test_adapters_have_trls_gradient(adapters, reason, both):
    assert assert_same(both(lora=adapters)).unpacked_because == reason


@pytest.mark.slow
@pytest.mark.parametrize("given", ["config", "model"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_adapters_move_and_the_base_model_does_not(given, checkpointing, ours, tiny_causal):
    config = LoraConfig(**ALL)
    if given == "config":
        kwargs = {"peft_config": config}
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_causal)
        kwargs = {"model": get_peft_model(model, config)}
        kwargs["processing_class"] = AutoTokenizer.from_pretrained(tiny_causal)
    overrides = dict(max_steps=2)
    if checkpointing is not None:
        overrides |= dict(gradient_checkpointing=True)
        overrides |= dict(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    trainer = ours(kwargs=kwargs, **overrides)
    assert trainer.unpacked_because is None
    before = weights_of(trainer)
    trainer.train()
    adapters = {name for name in before if "lora" in name and ".ref." not in name}
    assert adapters
    assert set(moved(before, weights_of(trainer))) == adapters


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_follows_training_without_it(reentrant, ours):
    after = []
    for checkpointing in (True, False):
        kwargs = {"use_reentrant": reentrant} if checkpointing else None
        trainer = ours(
            max_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=kwargs,
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        after.append(weights_of(trainer))
    for name, weight in after[1].items():
        torch.testing.assert_close(after[0][name], weight, rtol=1e-4, atol=1e-6)


EXPERT_WEIGHTS = LoraConfig(
    r=2,
    target_modules=[],
    target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    task_type="CAUSAL_LM",
)


@pytest.mark.parametrize("given", ["config", "model"])
def test_adapters_of_experts_move_away_from_their_reference(given, ours, tiny_tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SMALL, **EXPERTS, num_local_experts=4))
    kwargs = {"model": model, "peft_config": EXPERT_WEIGHTS, "processing_class": tiny_tokenizer}
    if given == "model":
        kwargs["model"] = get_peft_model(model, kwargs.pop("peft_config"))
    trainer = ours(kwargs=kwargs, max_steps=2)
    before = weights_of(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["unweighted_loss"] == pytest.approx(0.693147, abs=1e-4)
    adapters = {name for name in before if "lora" in name and ".ref." not in name}
    assert adapters
    assert set(moved(before, weights_of(trainer))) == adapters


def test_adapters_before_the_prompt_train(ours):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = ours(kwargs={"peft_config": config}, max_steps=1)
    assert trainer.unpacked_because == "its adapters are tokens before the prompt"
    before = weights_of(trainer)
    trainer.train()
    assert len(moved(before, weights_of(trainer))) == 1


def test_a_reference_of_its_own_does_not_move(ours, tiny_causal):
    reference = AutoModelForCausalLM.from_pretrained(tiny_causal)
    trainer = ours(kwargs={"ref_model": reference}, max_steps=1)
    before = weights_of(trainer)
    trainer.train()
    assert set(moved(before, weights_of(trainer))) == set(before)
    assert moved(before, dict(trainer.ref_model.named_parameters())) == []


def test_the_reference_can_follow_the_policy(ours):
    trainer = ours(max_steps=2, sync_ref_model=True, ref_model_sync_steps=2)
    before = {name: weight.clone() for name, weight in trainer.ref_model.named_parameters()}
    trainer.train()
    assert set(moved(before, dict(trainer.ref_model.named_parameters()))) == set(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_loaded_as_its_arguments_say(dtype, ours):
    trainer = ours(max_steps=2, model_init_kwargs={"dtype": dtype}, learning_rate=0.1)
    before = weights_of(trainer)
    trainer.train()
    assert {weight.dtype for weight in before.values()} == {dtype}
    assert {weight.dtype for weight in trainer.model.parameters()} == {dtype}
    assert len(moved(before, weights_of(trainer))) == len(before)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_is_run_if_allowed_alone(ours, tiny_causal, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(tiny_causal, folder)
    (folder / "own_model.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    # Of a type that transformers has no model of.
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "own_model.OwnConfig",
            "AutoModelForCausalLM": "own_model.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        ours(kwargs={"model": str(folder)})
    trainer = ours(kwargs={"model": str(folder)}, trust_remote_code=True, max_steps=1)
    assert type(trainer.model).__name__ == "OwnForCausalLM"
    assert trainer.unpacked_because is None
    trainer.train()


def test_images_are_refused(ours):
    data = dataset(ONES).add_column("images", [[None]] * len(ONES))
    with pytest.raises((DatasetError, ValueError), match=r"images|vision"):
        ours(data)


FORMS = {
    "dataset": lambda data: data,
    "dataset dict": lambda data: DatasetDict({"one": data, "two": data}),
    "dict": lambda data: {"one": data, "two": data},
}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_raw_dataset_can_be_evaluated(form, precompute, ours):
    trainer = ours(precompute_ref_log_probs=precompute)
    found = trainer.evaluate(eval_dataset=FORMS[form](dataset([0.5] * 8)))
    names = ["eval_loss"] if form == "dataset" else ["eval_one_loss", "eval_two_loss"]
    # The policy is the reference still: half of log 2.
    assert [found[name] for name in names] == pytest.approx([0.34657] * len(names), abs=1e-4)


def test_what_is_evaluated_needs_weights_too(ours):
    trainer = ours()
    with pytest.raises(DatasetError, match="no column 'confidence'"):
        trainer.evaluate(eval_dataset=dataset(ONES).remove_columns("confidence"))


@pytest.mark.parametrize("form", FORMS)
def test_references_of_evaluation_are_those_from_before_training(form, ours):
    trainer = ours(
        max_steps=1,
        precompute_ref_log_probs=True,
        kwargs={"eval_dataset": FORMS[form](dataset(ONES))},
    )
    trainer.train()
    assert "eval_loss" in {name.replace("one_", "") for name in trainer.evaluate()}
    with pytest.raises(ValueError, match="reference log-prob"):
        trainer.evaluate(eval_dataset=dataset(ONES))


def test_each_evaluation_set_is_logged_by_its_name(ours):
    sets = {"one": dataset([0.5] * 8), "two": dataset(ONES)}
    trainer = ours(kwargs={"eval_dataset": sets}, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = {name for line in trainer.state.log_history for name in line}
    # All other figures are those of the last set, as in TRL.
    assert {"eval_one_loss", "eval_two_loss", "eval_unweighted_loss", "eval_weight"} <= logged


@pytest.mark.parametrize("where", ["train", "eval", "eval dict"])
def test_streams_are_refused(where, ours):
    stream = dataset(ONES).to_iterable_dataset()
    evaluated = {"eval": stream, "eval dict": {"one": stream}}.get(where)
    with pytest.raises(DatasetError, match="is streamed"):
        ours(stream if where == "train" else None, kwargs={"eval_dataset": evaluated}, max_steps=1)


def test_no_dataset_or_several_are_refused_as_in_trl(ours, tiny_causal, tmp_path):
    config = ConfidenceDPOConfig(**options(tmp_path))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        ConfidenceDPOTrainer(model=str(tiny_causal), args=config)
    with pytest.raises(TypeError, match="must be a `Dataset`"):
        ours(DatasetDict({"train": dataset(ONES)}))


@pytest.mark.parametrize(
    "loss",
    [
        *("exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
        *("apo_down", "discopop", "sft", "sigmoid_norm", ["sigmoid", "bco_pair", "sft"]),
    ],
)
def test_losses_without_a_weighted_form_are_refused(loss, tmp_path):
    with pytest.raises(ConfigError, match="loss_type is one of"):
        ConfidenceDPOConfig(**options(tmp_path, loss_type=loss))


def test_logits_cannot_be_had(ours):
    with pytest.raises(ConfigError, match="compute_metrics is not supported"):
        ours(kwargs={"compute_metrics": lambda _: {}})
    trainer = ours()
    with pytest.raises(ConfigError, match="only losses are computed"):
        trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)


@pytest.mark.parametrize("adapters", [None, LoraConfig(**ALL)])
def test_the_model_is_tagged(adapters, ours):
    trainer = ours(kwargs={"peft_config": adapters})
    assert {"trl", "cwpo", "cw-dpo"} <= set(trainer.model.model_tags)


def test_callbacks_see_the_steps_and_what_is_logged(ours):
    seen = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

        def on_log(self, args, state, control, logs, **kwargs):
            seen.append("unweighted_loss" in logs)

    ours(kwargs={"callbacks": [Seen()]}, max_steps=2).train()
    assert seen == [1, True, 2, True, False]
