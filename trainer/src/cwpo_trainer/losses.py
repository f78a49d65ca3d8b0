"""Preference losses of one pair: eq. 9, 10 and 11 without the confidence in front, and others.

Pure functions of log-probabilities: of the policy and of the reference, of the chosen and of the
rejected response, each shape (n,), summed over the tokens of the response. All return shape (n,).
The confidence comes in at one place only, `weighted_mean` (eq. 7).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE_FREE = ("simpo", "orpo")
"""Losses that read no reference."""


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """DPO, eq. 9: -log sigmoid(beta * h), with h the difference of the two log-ratios."""
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -F.logsigmoid(beta * h)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    tau: float,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
) -> Tensor:
    """IPO, eq. 10: (h - 1 / (2 tau))^2.

    Args:
        tau: the regularisation strength; TRL calls it `beta`.
        chosen_tokens, rejected_tokens: tokens of each response, shape (n,). With them the log-ratio
            of a response is its mean over the tokens, as in TRL; without, its sum, as eq. 10 reads.
    """
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    if chosen_tokens is not None and rejected_tokens is not None:
        chosen = chosen / chosen_tokens
        rejected = rejected / rejected_tokens
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def rdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    epsilon: float,
) -> Tensor:
    """Robust DPO, eq. 11: DPO made unbiased where a share epsilon of the labels is flipped.

    Equal to -log sigmoid(beta h) - epsilon / (1 - 2 epsilon) * beta h: unbounded below.
    Raises: ValueError unless 0 <= epsilon < 1/2.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon must be in [0, 0.5), not {epsilon}")
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    clean = (1 - epsilon) * -F.logsigmoid(beta * h)
    flipped = epsilon * -F.logsigmoid(-beta * h)
    return (clean - flipped) / (1 - 2 * epsilon)


def hinge(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Hinge (SLiC, RSO): max(0, 1 - beta * h)."""
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return torch.relu(1 - beta * h)


def cdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    epsilon: float,
) -> Tensor:
    """Conservative DPO: DPO on labels that are right with probability 1 - epsilon.

    Unlike rdpo it is bounded below. Raises: ValueError unless 0 <= epsilon < 1/2.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon must be in [0, 0.5), not {epsilon}")
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -(1 - epsilon) * F.logsigmoid(beta * h) - epsilon * F.logsigmoid(-beta * h)


def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float,
    gamma: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """SimPO, without a reference: -log sigmoid(beta * difference of mean log-probs - gamma).

    Args:
        gamma: the margin aimed at.
        chosen_tokens, rejected_tokens: tokens of each response, shape (n,).
    """
    difference = policy_chosen / chosen_tokens - policy_rejected / rejected_tokens
    return -F.logsigmoid(beta * difference - gamma)


def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """ORPO, without a reference: NLL of the chosen a token - beta * log sigmoid(log odds ratio).

    The odds are of the mean log-probability a token. Shapes as in `simpo`.
    """
    chosen = policy_chosen / chosen_tokens
    rejected = policy_rejected / rejected_tokens
    odds = (chosen - torch.log(-torch.expm1(chosen))) - (
        rejected - torch.log(-torch.expm1(rejected))
    )
    return -chosen - beta * F.logsigmoid(odds)


def bradley_terry(margins: Tensor, *, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """The annotator's loss, eq. 5: -log sigmoid(margins - margin).

    Args:
        margins: score of the chosen less that of the rejected response, shape (n,).
        margin: what the scores have to differ by before a pair counts as well told apart.
        label_smoothing: share of labels taken to be flipped, in [0, 1/2).
    """
    apart = margins - margin
    return -(1 - label_smoothing) * F.logsigmoid(apart) - label_smoothing * F.logsigmoid(-apart)


def pairwise(forth: Tensor, back: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The pairwise annotator's loss, eq. 20: binary cross-entropy on both orders, their mean.

    Args:
        forth, back: logits of the first response being preferred, where the first is the chosen one
            and where it is the rejected one, each shape (n,).
        label_smoothing: share of labels taken to be flipped, in [0, 1/2).
    """
    return (
        bradley_terry(forth, label_smoothing=label_smoothing)
        + bradley_terry(-back, label_smoothing=label_smoothing)
    ) / 2


def weighted_mean(weights: Tensor, losses: Tensor) -> Tensor:
    """Eq. 7: the plain mean of c * loss, both shape (n,).

    Not divided by the sum of the weights: that would cancel the weight of a pair that is alone in
    its micro-batch, and gradient accumulation would change the result.
    """
    return torch.mean(weights * losses)
