"""What is replaced computes the same, and what would change stays."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cwpo_annotator.backends.torch.kernels.norms import RmsNorm
from cwpo_annotator.backends.torch.kernels.onednn import OneDnnGatedMlp, OneDnnLinear
from cwpo_annotator.backends.torch.kernels.replacement import replace_layers


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
        replace_layers(model, 10)
        outputs = model(inputs)
    # On a processor without such products nothing is replaced.
    is_fast = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(model[0], OneDnnGatedMlp) == (is_whole and is_fast)
    linear = sum(isinstance(module, OneDnnLinear) for module in model.modules())
    assert linear == (3 if is_fast else 0)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(outputs, expected, atol=tolerance, rtol=tolerance)


class Centred(LlamaRMSNorm):
    """Has the parts of a root mean square norm, and uses them otherwise."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class AroundOne(LlamaRMSNorm):
    """Multiplies by one more than the weight, as Gemma does."""

    def forward(self, x):
        return super().forward(x) + super().forward(x) / self.weight


class Gated(LlamaRMSNorm):
    """Takes a gate where there is one."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class Weightless(torch.nn.Module):
    """Has an epsilon and nothing to multiply with."""

    variance_epsilon = 1e-6

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


@pytest.mark.parametrize("norm", [Gated(24), Weightless()])
def test_a_norm_of_another_kind_stays(norm):
    model = torch.nn.Sequential(norm)
    replace_layers(model, 10)
    assert model[0] is norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "is_replaced"), [(LlamaRMSNorm, True), (Centred, False), (AroundOne, False)]
)
def test_a_norm_computes_the_same(kind, is_replaced, dtype):
    model = torch.nn.Sequential(kind(24, eps=0.1)).to(dtype)
    inputs = torch.randn(2, 5, 24).to(dtype)
    before = inputs.clone()
    with torch.inference_mode():
        model[0].weight.copy_(torch.linspace(0.5, 2, 24))
        expected = model(inputs)
        replace_layers(model, 10)
        outputs = model(inputs)
    assert isinstance(model[0], RmsNorm) == is_replaced
    torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(inputs, before)
