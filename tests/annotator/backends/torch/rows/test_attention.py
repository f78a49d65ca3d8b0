"""Attention over packed rows against attention over each text by itself."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from cwpo_annotator.backends.torch.rows.attention import attention
from cwpo_annotator.backends.torch.rows.layout import reading
from cwpo_annotator.backends.torch.rows.row import Row

# Of each text, how many tokens of the text before it it begins with, and how many it has besides:
# a tree with texts shorter and longer than a block of queries, of which one continues another and
# two begin with different parts of it; short texts with a beginning and without; a single text.
TEXTS = [(0, 350), (150, 140), (290, 25), (60, 9), (0, 30), (0, 9), (0, 20), (17, 4), (21, 5)]
TEXTS += [(0, 150)]


def row_of(texts):
    row, length = Row(), 0
    for number, (shared, own) in enumerate(texts):
        length = shared + own
        row.append([0] * length, [number], shared)
    return row


ROW = row_of(TEXTS)
TOKENS = len(ROW.ids)
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
    with torch.inference_mode(), reading(ROW.runs, CPU):
        output, _ = attention(SimpleNamespace(), query, key, value, None, sliding_window=window)
    for (shared, _), places in zip(TEXTS, ROW.places(), strict=True):
        expected = by_itself(query, key, value, torch.tensor(places), window)[shared:]
        error = (output[0, places[shared:]].float() - expected).norm()
        assert error <= tolerance * expected.norm()


def test_keys_and_bounds_lead_flash_attention_to_the_same():
    query, key, value = states(torch.float32)
    with reading(ROW.runs, CPU) as row:
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
        with torch.inference_mode(), reading(ROW.runs, torch.device("cuda")):
            output, _ = attention(
                SimpleNamespace(), *on_gpu, None, sliding_window=window, at_once=at_once
            )
        outputs.append(output.float())
    assert (outputs[0] - outputs[1]).norm() <= 5e-3 * outputs[0].norm()


def test_soft_capped_attention_is_refused():
    tensor = torch.zeros(1, 1, 4, 8)
    with (
        reading(row_of([(0, 4)]).runs, CPU),
        pytest.raises(ValueError, match="soft-capped"),
    ):
        attention(SimpleNamespace(), tensor, tensor, tensor, None, softcap=30.0)
