"""A device with memory for few tokens: models raise torch's own error for more of them."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.nn.modules.module import register_module_forward_pre_hook


def is_training() -> bool:
    return torch.is_grad_enabled()


def is_validating() -> bool:
    return not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@contextmanager
def memory_for(tokens, *, when=is_training):
    """Inside the block no model reads more tokens at a time.

    Args:
        tokens: a number, or a function from what is to be read to a number.
    """

    def refuse(module, inputs):
        if isinstance(module, torch.nn.Embedding) and when():
            read = inputs[0].numel()
            if read > (tokens(read) if callable(tokens) else tokens):
                raise torch.OutOfMemoryError(f"{read} tokens")

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
