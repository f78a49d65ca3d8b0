"""Policies that read packed rows, in which responses share one copy of their prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from cwpo.errors import first_line
from cwpo_annotator.backends.torch.log_probs import row_log_probs
from cwpo_annotator.backends.torch.rows.packing import pack_texts
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import drops_attention, share_prompts

# Prompts that a model is tried on, their tokens, and those of the two responses to each.
_PROBES, _SHARED, _OWN = 4, 20, (4, 7)


@dataclass(frozen=True, slots=True)
class PackedResponses:
    """A row, and where the response of each of its texts starts, in the order of `row.texts`."""

    row: Row
    starts: list[int]


def read_packed(model: Any, *, bfloat16: bool) -> str | None:
    """Let a causal language model read packed rows as well as batches.

    `model(packed=PackedResponses(...))` then gives the LogProbs of the row's responses, with
    gradients, by way of whatever wraps the model. All other calls give what they did.

    Args:
        model: as loaded, with or without adapters, before it is sharded.
        bfloat16: whether training computes in it.
    Returns: why the model cannot read rows, in which case it is as it was; None if it can.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapters are tokens before the prompt"
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if drops_attention(base):
        return "its attention has dropout"
    before = base.config.get_text_config()._attn_implementation
    device = base.device.type
    with _evaluating(base), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        if not share_prompts(base):
            return "its hidden states would be others"
        problem = _problem(base)
    if problem is not None:
        base.set_attn_implementation(before)
        return problem
    add_packed_forward(base)
    return None


def add_packed_forward(model: Any) -> None:
    """Give a causal language model that shares prompts the argument `packed`; see `read_packed`."""
    original = model.forward

    # With the signature of before, against which `generate` checks its arguments.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, packed: PackedResponses | None = None, **more: Any) -> Any:
        if packed is None:
            return original(*args, **more)
        head = self.get_output_embeddings()
        if isinstance(head, FSDPModule):
            # Its weight is read without a call of the head, which would gather it.
            head.unshard()
        return row_log_probs(self, packed.row, packed.starts, with_figures=True, handed_down=True)

    model.forward = MethodType(forward, model)


def _problem(model: Any) -> str | None:
    """What is wrong with the log-probabilities of a packed row, or with their gradient."""
    texts = [*_probe(model)]
    (row,) = pack_texts(texts, 1024)
    bfloat16 = torch.is_autocast_enabled(model.device.type) or model.dtype == torch.bfloat16
    # The first ones are behind all of the layers; a reference may have none.
    trained = [weight for weight in model.parameters() if weight.requires_grad][:2]
    try:
        with torch.enable_grad():
            expected = torch.stack([_log_prob(model, text) for text in texts])[row.texts]
            found = row_log_probs(model, row, [_SHARED] * len(texts), handed_down=True).sums
            if _difference(found, expected) > (0.05 if bfloat16 else 1e-4):
                return "its log-probabilities would be others"
            gradients = [_gradient(sums, trained) for sums in (found, expected) if trained]
            # The adapters of a 4-bit model are in bfloat16 until training begins.
            rounded = bfloat16 or any(weight.dtype == torch.bfloat16 for weight in trained)
            if trained and _difference(*gradients) > (0.3 if rounded else 1e-3):
                return "its gradient would be another"
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        return first_line(error)
    return None


def _probe(model: Any) -> Iterator[list[int]]:
    """Random texts, of which each two begin alike."""
    draw = np.random.default_rng(0)
    known = model.get_input_embeddings().weight.shape[0]
    for _ in range(_PROBES):
        prompt = draw.integers(known, size=_SHARED).tolist()
        for own in _OWN:
            yield [*prompt, *draw.integers(known, size=own).tolist()]


def _log_prob(model: Any, text: list[int]) -> Tensor:
    """Of the response of a text by itself, from the model's own logits."""
    ids = torch.tensor([text], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, _SHARED - 1 : -1].float()
    log_prob: Tensor = logits.log_softmax(dim=1).gather(1, ids[0, _SHARED:, None]).sum()
    return log_prob


def _gradient(log_probs: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Of a sum of log-probabilities, some of them with the other sign."""
    signs = torch.ones_like(log_probs)
    signs[::2] = -1
    of_weights = torch.autograd.grad(log_probs @ signs, weights, retain_graph=True)
    return torch.cat([part.flatten().float() for part in of_weights])


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative to what is expected."""
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inside the block the model has no dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
