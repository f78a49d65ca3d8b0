"""Attention over packed rows against attention over each text by itself."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from cwpo_annotator.backends.torch.rows.attention import attention
from cwpo_annotator.backends.torch.rows.layout import reading
from cwpo_annotator.backends.torch.rows.packing import Segment

# Texts shorter and longer than a block of queries, a pair without a shared prompt, a single text.
SEGMENTS = [Segment(0, 150, 200, 140), Segment(490, 0, 30, 9), Segment(529, 20, 130, 0)]
TOKENS = 679
CPU = torch.device("cpu")


def by_itself(query, key, value, tokens, window):
    """Attention of the text made of the given tokens, in float32, with an explicit mask."""
    query, key, value = (x[:, :, tokens].float() for x in (query, key, value))
    at = torch.arange(len(tokens))
    sees = at[:, None] >= at
    if window is not None:
        sees &= at[:, None] - at < window
    return scaled_dot_product_attention(query, key, value, sees, enable_gqa=True)[0].transpose(0, 1)


def states(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 6, TOKENS, 16), (1, 2, TOKENS, 16), (1, 2, TOKENS, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("window", [None, 16, 128, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str
)
def test_each_text_sees_its_own_tokens(dtype, tolerance, window):
    query, key, value = states(dtype)
    with torch.inference_mode(), reading(SEGMENTS, CPU):
        output, _ = attention(SimpleNamespace(), query, key, value, None, sliding_window=window)
    for segment in SEGMENTS:
        prompt = torch.arange(segment.start, segment.start + segment.prompt)
        start = segment.start + segment.prompt
        first = torch.arange(start, start + segment.first)
        second = torch.arange(start + segment.first, start + segment.first + segment.second)
        for own in (first, second):
            expected = by_itself(query, key, value, torch.cat((prompt, own)), window)
            found = output[0, own].float()
            error = (found - expected[len(prompt) :]).norm()
            assert error <= tolerance * expected[len(prompt) :].norm()


def test_keys_and_bounds_lead_flash_attention_to_the_same():
    query, key, value = states(torch.float32)
    with reading(SEGMENTS, CPU) as row:
        expected, _ = attention(SimpleNamespace(), query, key, value, None)
    tokens, keys = row.token_bounds.tolist(), row.key_bounds.tolist()
    assert tokens[-1] == TOKENS
    for run in range(len(tokens) - 1):
        own = slice(tokens[run], tokens[run + 1])
        seen = row.keys[keys[run] : keys[run + 1]]
        # What flash attention computes for one of its sequences.
        bias = causal_lower_right(own.stop - own.start, len(seen))
        found = scaled_dot_product_attention(
            query[:, :, own], key[:, :, seen], value[:, :, seen], attn_mask=bias, enable_gqa=True
        )
        torch.testing.assert_close(found.transpose(1, 2), expected[:, own])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("window", [None, 128])
def test_flash_attention_sees_the_same(window):
    on_gpu = [x.cuda() for x in states(torch.bfloat16)]
    outputs = []
    for at_once in (False, True):
        with torch.inference_mode(), reading(SEGMENTS, torch.device("cuda")):
            output, _ = attention(
                SimpleNamespace(), *on_gpu, None, sliding_window=window, at_once=at_once
            )
        outputs.append(output.float())
    assert (outputs[0] - outputs[1]).norm() <= 5e-3 * outputs[0].norm()


def test_soft_capped_attention_is_refused():
    tensor = torch.zeros(1, 1, 4, 8)
    with (
        reading([Segment(0, 0, 4, 0)], CPU),
        pytest.raises(ValueError, match="soft-capped"),
    ):
        attention(SimpleNamespace(), tensor, tensor, tensor, None, softcap=30.0)
