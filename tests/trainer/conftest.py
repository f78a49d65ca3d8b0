from __future__ import annotations

from http.server import ThreadingHTTPServer
from threading import Thread

import pytest

from cwpo import cli

from .hub import Hub


@pytest.fixture
def command():
    """Runs a Command with flags, as `cwpo NAME` does."""

    def run(kind, *arguments):
        cli.run(kind, [str(argument) for argument in arguments], f"cwpo {kind.__name__}")

    return run


@pytest.fixture
def failure(command):
    """Runs a Command that has to fail, and gives the one line that it fails with."""

    def run(kind, *arguments):
        with pytest.raises(SystemExit) as stopped:
            command(kind, *arguments)
        message = str(stopped.value.code)
        assert message.count("\n") == 0
        return message

    return run


@pytest.fixture
def hub():
    Hub.created, Hub.files, Hub.mistakes = [], {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def wide_models(tiny_tokenizer, tmp_path_factory):
    """Two families, large enough for their tensors to outweigh all else."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    root = tmp_path_factory.mktemp("models")
    common = dict(vocab_size=len(tiny_tokenizer), hidden_size=192, num_hidden_layers=4)
    tokens = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0, num_attention_heads=4)
    configs = {
        "llama": LlamaConfig(
            **common, **tokens, intermediate_size=512, num_key_value_heads=2, attention_dropout=0.0
        ),
        "opt": OPTConfig(**common, **tokens, ffn_dim=768, word_embed_proj_dim=192),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def small_causal(tiny_tokenizer, tmp_path_factory):
    """A language model of a width that 4-bit weights come in, whole blocks of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("small") / "causal"
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
