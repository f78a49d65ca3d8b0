from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_bert(tiny_tokenizer, tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    BertModel(
        BertConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
