"""Preference losses of one pair: eq. 9, 10 and 11 without the confidence in front, and others.

Pure functions of log-probabilities: of the policy and of the reference, of the chosen and of the
rejected response, each shape (n,), summed over the tokens of the response. All return shape (n,).
The confidence comes in at one place only, `weighted_mean` (eq. 7).

`LOSSES` lists what `cwpo align --loss` offers. Flags, their checks, the trainer's choice of the
function, the plan of a run and the table in docs/training.md all follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cwpo_trainer.constants import Constant

if TYPE_CHECKING:
    # Tensors bring their functions along: --help, which needs LOSSES, does not wait for torch.
    from torch import Tensor

_Positive = Annotated[float, Field(gt=0)]

BETA = Constant(
    "beta",
    "beta",
    _Positive,
    0.5,
    "Strength of the pull towards the reference model; of simpo the scale of the difference of "
    "mean log-probabilities, of orpo the weight of the odds ratio",
)
TAU = Constant(
    "tau",
    "tau",
    _Positive,
    0.5,
    "Strength of the pull towards the reference model, which TRL calls beta, as --beta may here; "
    "the margin aimed at is 1 / (2 tau)",
    trl_name="beta",
)
LENGTH_NORMALISED = Constant(
    "length_normalised",
    "ipo_length_normalised",
    bool,
    True,
    "Divide the log-ratio of a response by its number of tokens, as TRL does; eq. 10 of the CW-PO "
    "paper has it undivided",
)
EPSILON = Constant(
    "epsilon",
    "epsilon",
    Annotated[float, Field(ge=0, lt=0.5)],
    0.1,
    "Share of the labels assumed to be wrong",
    trl_name="label_smoothing",
)
GAMMA = Constant(
    "gamma",
    "gamma",
    Annotated[float, Field(ge=0)],
    0.5,
    "Margin aimed at between the two responses",
    trl_name="simpo_gamma",
)


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
    return -_log_sigmoid(beta * h)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    tau: float,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    length_normalised: bool = True,
) -> Tensor:
    """IPO, eq. 10: (h - 1 / (2 tau))^2.

    Args:
        tau: the regularisation strength; TRL calls it `beta`.
        chosen_tokens, rejected_tokens: tokens of each response, shape (n,). With them the log-ratio
            of a response is its mean over the tokens, as in TRL; without, its sum, as eq. 10 reads.
        length_normalised: whether token counts that are given are to be used.
    """
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    if length_normalised and chosen_tokens is not None and rejected_tokens is not None:
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
    epsilon: float | Tensor,
) -> Tensor:
    """Robust DPO, eq. 11: DPO made unbiased where a share epsilon of the labels is flipped.

    Equal to -log sigmoid(beta h) - epsilon / (1 - 2 epsilon) * beta h: unbounded below.

    Args:
        epsilon: one for all pairs, or shape (n,), which is not checked.
    Raises: ValueError unless 0 <= epsilon < 1/2.
    """
    _check_epsilon(epsilon)
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    clean = (1 - epsilon) * -_log_sigmoid(beta * h)
    flipped = epsilon * -_log_sigmoid(-beta * h)
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
    return (1 - beta * h).relu()


def cdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    epsilon: float | Tensor,
) -> Tensor:
    """Conservative DPO: DPO on labels that are right with probability 1 - epsilon.

    Unlike rdpo it is bounded below.

    Args:
        epsilon: one for all pairs, or shape (n,), which is not checked.
    Raises: ValueError unless 0 <= epsilon < 1/2.
    """
    _check_epsilon(epsilon)
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -(1 - epsilon) * _log_sigmoid(beta * h) - epsilon * _log_sigmoid(-beta * h)


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
    return -_log_sigmoid(beta * difference - gamma)


def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """ORPO, without a reference: NLL of the chosen a token - beta * log sigmoid(log odds ratio).

    The odds are of the mean log-probability a token, of which 1 - p counts as at least the
    resolution of the number format: at p = 1 odds and gradient would be infinite. Shapes as in
    `simpo`.
    """
    chosen = policy_chosen / chosen_tokens
    rejected = policy_rejected / rejected_tokens
    return -chosen - beta * _log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_prob: Tensor) -> Tensor:
    from torch import finfo

    other = (-log_prob.expm1()).clamp(min=finfo(log_prob.dtype).eps)
    return log_prob - other.log()


@dataclass(frozen=True)
class Loss:
    """A loss of `cwpo align`.

    Args:
        function: of two log-probabilities without a reference, of four with one.
        trl_type: its name in `loss_type` of ConfidenceDPOConfig.
        formula: in LaTeX, for the docs.
        source: the paper's equation, or where else it is from.
        takes_tokens: whether the function is also given chosen_tokens and rejected_tokens.
    """

    function: Callable[..., Tensor]
    trl_type: str
    formula: str
    source: str
    constants: tuple[Constant, ...]
    reads_reference: bool = True
    takes_tokens: bool = False


LOSSES = {
    "dpo": Loss(dpo, "sigmoid", r"-\log \sigma(\beta h)", "eq. 9", (BETA,)),
    "ipo": Loss(
        ipo,
        "ipo",
        r"\big(h - \frac{1}{2\tau}\big)^2",
        "eq. 10",
        (TAU, LENGTH_NORMALISED),
        takes_tokens=True,
    ),
    "rdpo": Loss(
        rdpo,
        "robust",
        r"\frac{-(1-\varepsilon) \log \sigma(\beta h) + \varepsilon \log \sigma(-\beta h)}"
        r"{1 - 2\varepsilon}",
        "eq. 11",
        (BETA, EPSILON),
    ),
    "hinge": Loss(hinge, "hinge", r"\max(0, 1 - \beta h)", "SLiC, RSO", (BETA,)),
    "cdpo": Loss(
        cdpo,
        "cdpo",
        r"-(1-\varepsilon) \log \sigma(\beta h) - \varepsilon \log \sigma(-\beta h)",
        "conservative DPO",
        (BETA, EPSILON),
    ),
    "simpo": Loss(
        simpo,
        "simpo",
        r"-\log \sigma\big(\beta\, (l_\pi(\hat y^+)/\lvert \hat y^+ \rvert"
        r" - l_\pi(\hat y^-)/\lvert \hat y^- \rvert) - \gamma\big)",
        "SimPO",
        (BETA, GAMMA),
        reads_reference=False,
        takes_tokens=True,
    ),
    "orpo": Loss(
        orpo,
        "orpo",
        r"-l_\pi(\hat y^+)/\lvert \hat y^+ \rvert - \beta \log \sigma(\log o^+ - \log o^-),"
        r"\ o = p/(1-p),\ p = e^{l_\pi(y)/\lvert y \rvert}",
        "ORPO",
        (BETA,),
        reads_reference=False,
        takes_tokens=True,
    ),
}

OF_TRL_TYPE = {loss.trl_type: loss for loss in LOSSES.values()}
"""The losses by the name that ConfidenceDPOConfig has for them."""

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[*LOSSES]


def bradley_terry(margins: Tensor, *, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """The annotator's loss, eq. 5: -log sigmoid(margins - margin).

    Args:
        margins: score of the chosen less that of the rejected response, shape (n,).
        margin: what the scores have to differ by before a pair counts as well told apart.
        label_smoothing: share of labels taken to be flipped, in [0, 1/2).
    """
    apart = margins - margin
    return -(1 - label_smoothing) * _log_sigmoid(apart) - label_smoothing * _log_sigmoid(-apart)


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
    return (weights * losses).mean()


def _check_epsilon(epsilon: float | Tensor) -> None:
    if isinstance(epsilon, float | int):
        EPSILON.check(epsilon)


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)
