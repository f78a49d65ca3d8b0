"""Small random annotators of the kinds that are read in different ways."""

import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
)

from cwpo_annotator.checkpoint import REFERENCE_NAME, Card, EncodingSpec, write_card

SPEC = EncodingSpec(max_length=128, pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_encoder(tiny_tokenizer, tmp_path_factory):
    """The folder of a BERT, which is read in padded batches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "encoder"
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_card(folder, Card(encoding=SPEC))
    return folder


@pytest.fixture(scope="session")
def tiny_implicit(tiny_causal, tmp_path_factory):
    """The folder of two language models, by whose log-ratio responses are scored."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny") / "implicit"
    shutil.copytree(tiny_causal, folder)
    config = AutoConfig.from_pretrained(tiny_causal)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / REFERENCE_NAME)
    write_card(folder, Card(encoding=SPEC, objective="dpo", beta=0.2))
    return folder


@pytest.fixture(params=["packed", "padded", "implicit"])
def folder(request, tiny_annotator, tiny_encoder, tiny_implicit):
    """Of an annotator of either kind."""
    folders = {"packed": tiny_annotator, "padded": tiny_encoder, "implicit": tiny_implicit}
    return folders[request.param]
