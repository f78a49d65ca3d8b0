"""What oneDNN replaces computes the same, and what it would change stays."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from cwpo_annotator.backends import onednn


class Ungated(LlamaMLP):
    """Has the parts of a gated layer, and uses them otherwise."""

    def forward(self, x):
        return self.down_proj(self.up_proj(x) + self.gate_proj(x))


def model_of(kind, activation="silu", bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        hidden_act=activation,
        mlp_bias=bias,
    )
    return torch.nn.Sequential(kind(config)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "activation", "is_whole"),
    [(LlamaMLP, "silu", True), (LlamaMLP, "gelu", False), (Ungated, "silu", False)],
)
def test_a_feed_forward_layer_computes_the_same(kind, activation, is_whole, bias, dtype):
    model = model_of(kind, activation, bias, dtype)
    inputs = torch.randn(2, 5, 24, dtype=dtype)
    with torch.inference_mode():
        expected = model(inputs)
        onednn.lay_out(model, 10)
        outputs = model(inputs)
    assert isinstance(model[0], onednn.OneDnnGatedMlp) == is_whole
    assert sum(isinstance(module, onednn.OneDnnLinear) for module in model.modules()) == 3
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(outputs, expected, atol=tolerance, rtol=tolerance)
