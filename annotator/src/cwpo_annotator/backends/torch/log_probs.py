"""Log-probabilities of responses under a causal language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cwpo_annotator.backends.torch.hardware.device import integers
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.backends.torch.rows.shared_prompts import read_row

# Logits that exist at a time: on a CPU they stay near the caches, a GPU needs more to be busy.
_LOGITS = {"cpu": 1 << 22}
_LOGITS_OF_A_GPU = 1 << 25


def logits_at_a_time(device_type: str) -> int:
    """Number of logits that exist at a time, whatever a row or batch has."""
    return _LOGITS.get(device_type, _LOGITS_OF_A_GPU)


@dataclass(frozen=True, slots=True)
class Response:
    """Where one response stands in hidden states laid end to end.

    before: of each of its tokens, the place whose hidden state predicts it; targets: the tokens.
    """

    before: Sequence[int]
    targets: Sequence[int]


class LogProbs(NamedTuple):
    """Of each response, float32, shape (responses,).

    sums: its log-probability. Without a gradient, and None unless asked for: entropies: in nats, of
    what is predicted at its tokens, summed; likeliest: number of its tokens that are what the model
    holds likeliest.
    """

    sums: Tensor
    entropies: Tensor | None = None
    likeliest: Tensor | None = None


def log_probs(
    model: Any, hidden: Tensor, responses: Sequence[Response], *, with_figures: bool = False
) -> LogProbs:
    """The log-probability of each response, its tokens summed.

    Args:
        hidden: what the model's backbone makes of the tokens, shape (tokens, width).
    """
    device = hidden.device
    before = integers([at for item in responses for at in item.before], device)
    targets = integers([token for item in responses for token in item.targets], device)
    owner = integers([at for at, item in enumerate(responses) for _ in item.targets], device)
    head = model.get_output_embeddings()
    of_tokens: tuple[Tensor, Tensor, Tensor]
    if torch.is_grad_enabled():
        of_tokens = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden[before], head.weight, head.bias, targets, with_figures
        )
    else:
        of_tokens = _scan(head, hidden[before], targets, with_figures)
    nothing = torch.zeros(len(responses), device=device)
    sums, *figures = (nothing.index_add(0, owner, of_token) for of_token in of_tokens)
    return LogProbs(sums, *figures) if with_figures else LogProbs(sums)


def row_log_probs(
    model: Any,
    row: Row,
    starts: Sequence[int],
    *,
    with_figures: bool = False,
    handed_down: bool = False,
) -> LogProbs:
    """The log-probabilities of the responses in a packed row, in the order of `row.texts`.

    Args:
        model: one that `share_prompts` has switched to packed rows.
        starts: where the response of each text of the row starts, in the text's own tokens.
        handed_down: see `read_row`.
    """
    hidden = read_row(model, row, handed_down=handed_down)
    # Equal texts are read at one place.
    distinct: dict[tuple[int, int], Response] = {}
    asked = [*zip(row.last, starts, strict=True)]
    for text, places in zip(asked, row.places(), strict=True):
        if text not in distinct:
            ids = [row.ids[place] for place in places]
            distinct[text] = _response(places, ids, start=text[1])
    order = {text: at for at, text in enumerate(distinct)}
    found = log_probs(model, hidden, [*distinct.values()], with_figures=with_figures)
    of_texts = integers([order[text] for text in asked], hidden.device)
    sums, *figures = found
    return LogProbs(
        sums[of_texts], *(None if values is None else values[of_texts] for values in figures)
    )


def batch_log_probs(model: Any, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> LogProbs:
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


class _TokenLogProbs(torch.autograd.Function):
    """Log-probability of each target, with its figures, by way of few logits at once.

    The gradient with respect to a hidden state h, where p are the probabilities and W the weight of
    the head, is W[target] - p W. Where the head is frozen it is computed in the forward pass, while
    the logits are at hand; a head that is trained needs them once more in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        with_figures: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Float32, shape (targets,) each; hidden: (targets, width), weight: (vocabulary, width)."""
        ctx.trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.dtype = _computed_in(hidden)
        head = _Head(weight, bias, ctx.dtype)
        of_hidden = None if ctx.trains_head else torch.empty_like(hidden)
        found, entropies, likeliest = _scan(head, hidden, targets, with_figures, of_hidden)
        ctx.mark_non_differentiable(entropies, likeliest)
        if ctx.trains_head:
            ctx.save_for_backward(hidden, weight, bias, targets)
        else:
            ctx.save_for_backward(of_hidden)
        return found, entropies, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Of what `forward` takes."""
        if not ctx.trains_head:
            (of_hidden,) = ctx.saved_tensors
            return (gradient[:, None] * of_hidden).to(of_hidden.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        head = _Head(weight, bias, ctx.dtype)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for part in _parts(hidden, len(weight)):
            states = hidden[part].to(ctx.dtype)
            of_logits = torch.softmax(head(states).float(), dim=1).neg_()
            of_logits[torch.arange(len(states)), targets[part]] += 1
            of_logits *= gradient[part, None]
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0)
            of_logits = of_logits.to(ctx.dtype)
            of_hidden[part] = (of_logits @ head.weight).to(hidden.dtype)
            of_weight += of_logits.T @ states
        return (
            of_hidden,
            of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


class _Head:
    """A linear layer in the number format that is computed in, cast once for all of its inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.out_features = len(weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def _scan(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    with_figures: bool,
    of_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each target its log-probability, the entropy, and whether nothing is likelier.

    The figures are 0 unless asked for.

    Args:
        of_hidden: takes the gradients of the log-probabilities.
    """
    if type(head) is torch.nn.Linear:
        head = _Head(head.weight, head.bias, _computed_in(hidden))
    found = torch.empty(len(targets), device=hidden.device)
    entropies, likeliest = torch.zeros_like(found), torch.zeros_like(found)
    for part in _parts(hidden, head.out_features):
        of_all = torch.log_softmax(head(hidden[part]).float(), dim=1)
        found[part] = of_all.gather(1, targets[part, None])[:, 0]
        if with_figures or of_hidden is not None:
            probabilities = of_all.exp()
        if with_figures:
            entropies[part] = -torch.linalg.vecdot(probabilities, of_all)
            likeliest[part] = (found[part] == of_all.amax(dim=1)).float()
        if of_hidden is not None:
            expected = probabilities.to(head.weight.dtype) @ head.weight
            of_hidden[part] = (head.weight[targets[part]] - expected).to(hidden.dtype)
    return found, entropies, likeliest


def _parts(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    """Parts of the hidden states whose logits may exist at a time."""
    size = max(1, logits_at_a_time(hidden.device.type) // vocabulary)
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _computed_in(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
