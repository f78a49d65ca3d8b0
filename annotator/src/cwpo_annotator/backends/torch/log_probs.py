"""Log-probabilities of responses under a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cwpo_annotator.backends.torch.hardware.device import integers
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import read_row

# Logits that exist at a time, so that they never fill memory.
_LOGITS = 1 << 23


@dataclass(frozen=True, slots=True)
class Response:
    """Where one response stands in hidden states laid end to end.

    before: of each of its tokens, the place whose hidden state predicts it; targets: the tokens.
    """

    before: Sequence[int]
    targets: Sequence[int]


def log_probs(model: Any, hidden: Tensor, responses: Sequence[Response]) -> Tensor:
    """Summed log-probability of each response, float32, shape (responses,).

    Args:
        hidden: what the model's backbone makes of the tokens, shape (tokens, width).
    """
    device = hidden.device
    before = integers([at for item in responses for at in item.before], device)
    targets = integers([token for item in responses for token in item.targets], device)
    owner = integers([at for at, item in enumerate(responses) for _ in item.targets], device)
    head = model.get_output_embeddings()
    size = max(1, _LOGITS // head.out_features)
    sums = torch.zeros(len(responses), device=device)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        arguments = head, hidden[before[part]], targets[part]
        # The logits are made again for the gradient rather than kept.
        each = (
            checkpoint(_of_tokens, *arguments, use_reentrant=False)
            if torch.is_grad_enabled()
            else _of_tokens(*arguments)
        )
        sums = sums.index_add(0, owner[part], each)
    return sums


def row_log_probs(model: Any, row: Row, starts: Sequence[int]) -> Tensor:
    """The log-probabilities of the responses in a packed row, in the order of `row.texts`.

    Args:
        model: one that `share_prompts` has switched to packed rows.
        starts: where the response of each text of the row starts, in the text's own tokens.
    """
    hidden = read_row(model, row)
    # Equal texts are read at one place.
    distinct: dict[tuple[int, int], Response] = {}
    asked = [*zip(row.last, starts, strict=True)]
    for text, places in zip(asked, row.places(), strict=True):
        if text not in distinct:
            ids = [row.ids[place] for place in places]
            distinct[text] = _response(places, ids, start=text[1])
    order = {text: at for at, text in enumerate(distinct)}
    sums = log_probs(model, hidden, [*distinct.values()])
    return sums[integers([order[text] for text in asked], sums.device)]


def batch_log_probs(model: Any, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
    """The log-probabilities of the responses of texts, which are padded to one length.

    Args:
        starts: where the response of each text starts, in the text's own tokens.
    """
    ids, mask = padded(texts, 0, model.device)
    output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    begins = range(0, ids.numel(), ids.shape[1])
    responses = [
        _response(range(begin, begin + len(text)), text, start)
        for begin, text, start in zip(begins, texts, starts, strict=True)
    ]
    return log_probs(model, output.last_hidden_state.flatten(0, 1), responses)


def _response(where: Sequence[int], ids: Sequence[int], start: int) -> Response:
    # Nothing predicts the first token of all.
    start = max(start, 1)
    return Response(where[start - 1 : -1], ids[start:])


def _of_tokens(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = head(hidden).float()
    chosen: Tensor = logits.gather(1, targets[:, None])[:, 0]
    normaliser: Tensor = logits.logsumexp(dim=1)
    return chosen - normaliser
