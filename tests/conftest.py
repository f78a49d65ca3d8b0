"""Fixtures that several parts share: real data, and models small enough to build in a second."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

# How long an example takes is the machine's doing.
hypothesis.settings.register_profile("cwpo", deadline=None)
hypothesis.settings.load_profile("cwpo")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes that run side by side share the cores; threads that wait for each other hinder all.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    processes = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
# What is tokenised here is of no use to anybody else.
_DATASETS = tempfile.TemporaryDirectory(prefix="cwpo-datasets-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS.name
# The name is also the environment twin of `cwpo up --data-dir`: keep it from child processes.
_DATA_DIR = os.environ.pop("CWPO_DATA_DIR", None)
# So is this of `cwpo serve --vllm-python`, and of all that sample answers.
_VLLM_PYTHON = os.environ.pop("CWPO_VLLM_PYTHON", None)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = (
    "the a of to and in is you that it for on are with as I be at this have from or had by not "
    "word what some we can out other were all there when up use your how said an each she which "
    "do their time if will way about many then them write would like so these her long make "
    "thing see him two has look more day could go come did number sound no most people my over "
    "know water than call first who may down side been now find Human Assistant hello why cat "
    "Sure sorry please thanks question answer because good bad help safe rude kind"
)


def pytest_addoption(parser):
    group = parser.getgroup("chaos", "how much tests/worker/test_chaos.py breaks")
    group.addoption("--chaos-rows", type=int, default=20_000, help="rows of a job")
    group.addoption("--chaos-kills", type=int, default=6, help="processes to kill")
    group.addoption("--chaos-seed", type=int, default=5, help="of the moments and the victims")
    group.addoption("--chaos-earlier", help="another checkout, from which a fleet is upgraded")
    parser.addoption(
        "--screenshots",
        metavar="ANNOTATOR",
        help="write docs/images: the page of a service with this annotator's checkpoint",
    )
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write the losses that tests/trainer/test_golden_losses.py compares with",
    )


def pytest_collection_modifyitems(items):
    """Whatever loads a real model is slow."""
    for item in items:
        if "real_models" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell each test process of pytest-xdist what it does not find in its environment."""
    node.workerinput["data_dir"] = _DATA_DIR
    node.workerinput["vllm_python"] = _VLLM_PYTHON


@pytest.fixture(scope="session")
def data_dir(request) -> Path:
    """The folder of real human preference data; tests that need it are skipped without."""
    folder = getattr(request.config, "workerinput", {}).get("data_dir", _DATA_DIR)
    if folder is None:
        pytest.skip("CWPO_DATA_DIR is not set")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def vllm_python(request) -> Path:
    """The Python of an environment with vLLM; tests that need it are skipped without."""
    python = getattr(request.config, "workerinput", {}).get("vllm_python", _VLLM_PYTHON)
    if python is None:
        pytest.skip("CWPO_VLLM_PYTHON is not set: make test-vllm")
    # Not resolved: that would leave the environment.
    return Path(python).absolute()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of some 500 tokens with EOS, pad and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<eos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_causal(tiny_tokenizer, tmp_path_factory) -> Path:
    """The folder of a random two-layer Llama language model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "causal"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_annotator(tiny_tokenizer, tmp_path_factory) -> Path:
    """The folder of an annotator checkpoint over a random two-layer Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from cwpo_annotator.checkpoint import Card, EncodingSpec, write_card

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny") / "annotator"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        num_labels=1,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_card(folder, Card(encoding=EncodingSpec(max_length=128, pad_token="<pad>")))
    return folder


@pytest.fixture(scope="session")
def real_models(request) -> Path:
    """The folder models/ with the real SmolLM2-135M and MiniLM, unpacked where they are not yet."""
    import importlib.util

    root = request.config.rootpath
    spec = importlib.util.spec_from_file_location("models", root / "examples" / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    for name in models.UNPACK:
        models.unpacked(name, root / "models")
    return root / "models"


@pytest.fixture(scope="session")
def scalar_head(real_models, tmp_path_factory):
    """`scalar_head("smollm2")`: a real backbone with a random scalar head, as training starts."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from cwpo_annotator.encoding.encoder import Encoder

    @functools.cache
    def build(name: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("real") / name
        encoder = Encoder.create(real_models / name)
        model = AutoModelForSequenceClassification.from_pretrained(real_models / name, num_labels=1)
        model.config.pad_token_id = encoder.pad_token_id
        model.save_pretrained(folder)
        encoder.save(folder)
        return folder

    return build


@pytest.fixture(params=["smollm2", "minilm"])
def real_annotator(request, scalar_head) -> Path:
    """A causal backbone, and an encoder."""
    return scalar_head(request.param)


@pytest.fixture(scope="session")
def hugging_face_scores():
    """The oracle: Hugging Face's own forward pass, one unpadded text at a time, in float32."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification

    def score(folder, pairs):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        model.eval()
        texts = [torch.tensor([list(ids)]) for pair in pairs for ids in (pair.a, pair.b)]
        with torch.inference_mode():
            return np.array([model(text).logits[0, 0].item() for text in texts]).reshape(-1, 2)

    return score
