from __future__ import annotations

import inspect
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_config import DPOConfig

from cwpo_trainer import ConfidenceDPOConfig, losses
from cwpo_trainer.losses import LOSSES
from cwpo_trainer.settings.policy_training import Alignment

# Two pairs, worked by hand: h = (-10 + 12) - (-8 + 7) = 3 and h = (-5 + 4) - (-6 + 9) = -4.
POLICY_CHOSEN = torch.tensor([-10.0, -5.0])
POLICY_REJECTED = torch.tensor([-8.0, -6.0])
REFERENCE_CHOSEN = torch.tensor([-12.0, -4.0])
REFERENCE_REJECTED = torch.tensor([-7.0, -9.0])
LOG_PROBS = (POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo():
    expected = torch.tensor([softplus(-1.5), softplus(2.0)])
    torch.testing.assert_close(losses.dpo(*LOG_PROBS, beta=0.5), expected)
    assert losses.dpo(*LOG_PROBS, beta=0.5)[0].item() == pytest.approx(0.2014133)


def test_ipo_on_sums():
    # 1 / (2 * 0.25) = 2: (3 - 2)^2 and (-4 - 2)^2
    torch.testing.assert_close(losses.ipo(*LOG_PROBS, tau=0.25), torch.tensor([1.0, 36.0]))


def test_ipo_on_means_over_tokens():
    # 2 / 4 - (-1) / 2 = 1 and -1 / 1 - 3 / 6 = -1.5, less 2
    actual = losses.ipo(
        *LOG_PROBS,
        tau=0.25,
        chosen_tokens=torch.tensor([4, 1]),
        rejected_tokens=torch.tensor([2, 6]),
    )
    torch.testing.assert_close(actual, torch.tensor([1.0, 12.25]))


def test_rdpo_is_dpo_less_a_line():
    # Eq. 11 equals -log sigmoid(beta h) - epsilon / (1 - 2 epsilon) beta h; epsilon 0.2 gives 1/3.
    expected = torch.tensor([softplus(-1.5) - 1.5 / 3, softplus(2.0) + 2.0 / 3])
    torch.testing.assert_close(losses.rdpo(*LOG_PROBS, beta=0.5, epsilon=0.2), expected)


def test_rdpo_without_flips_is_dpo():
    expected = losses.dpo(*LOG_PROBS, beta=0.5)
    torch.testing.assert_close(losses.rdpo(*LOG_PROBS, beta=0.5, epsilon=0.0), expected)


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 1.0, math.nan])
def test_rdpo_refuses_an_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        losses.rdpo(*LOG_PROBS, beta=0.5, epsilon=epsilon)


def test_weighted_mean_is_not_divided_by_the_weights():
    weights = torch.tensor([0.5, 0.0])
    assert losses.weighted_mean(weights, torch.tensor([2.0, 100.0])).item() == 0.5


def test_hinge():
    # 1 - 0.5 * 3 is below 0; 1 + 0.5 * 4 is 3
    torch.testing.assert_close(losses.hinge(*LOG_PROBS, beta=0.5), torch.tensor([0.0, 3.0]))


def test_cdpo():
    expected = torch.tensor(
        [0.8 * softplus(-1.5) + 0.2 * softplus(1.5), 0.8 * softplus(2.0) + 0.2 * softplus(-2.0)]
    )
    torch.testing.assert_close(losses.cdpo(*LOG_PROBS, beta=0.5, epsilon=0.2), expected)


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, math.nan])
def test_cdpo_refuses_an_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        losses.cdpo(*LOG_PROBS, beta=0.5, epsilon=epsilon)


TOKENS = {"chosen_tokens": torch.tensor([4, 5]), "rejected_tokens": torch.tensor([2, 3])}


def test_simpo():
    # 2 * (-10 / 4 + 8 / 2) - 0.5 = 2.5 and 2 * (-5 / 5 + 6 / 3) - 0.5 = 1.5
    actual = losses.simpo(POLICY_CHOSEN, POLICY_REJECTED, beta=2.0, gamma=0.5, **TOKENS)
    torch.testing.assert_close(actual, torch.tensor([softplus(-2.5), softplus(-1.5)]))


def test_orpo():
    # Mean log-probabilities of log(1/2) against log(1/4): odds of 1 and 1/3, so 3 / (3 + 1).
    actual = losses.orpo(
        torch.tensor([4 * math.log(0.5)]),
        torch.tensor([2 * math.log(0.25)]),
        beta=0.1,
        chosen_tokens=torch.tensor([4]),
        rejected_tokens=torch.tensor([2]),
    )
    assert actual.item() == pytest.approx(math.log(2) + 0.1 * math.log(4 / 3))


def test_bradley_terry():
    margins = torch.tensor([2.0, -1.0])
    plain = torch.tensor([softplus(-2.0), softplus(1.0)])
    torch.testing.assert_close(losses.bradley_terry(margins), plain)
    apart = torch.tensor([softplus(-1.5), softplus(1.5)])
    torch.testing.assert_close(losses.bradley_terry(margins, margin=0.5), apart)
    smoothed = torch.tensor(
        [0.9 * softplus(-2.0) + 0.1 * softplus(2.0), 0.9 * softplus(1.0) + 0.1 * softplus(-1.0)]
    )
    torch.testing.assert_close(losses.bradley_terry(margins, label_smoothing=0.1), smoothed)


def test_pairwise():
    forth, back = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0])
    plain = [(softplus(-2.0) + softplus(0.5)) / 2, (softplus(1.0) + math.log(2)) / 2]
    torch.testing.assert_close(losses.pairwise(forth, back), torch.tensor(plain))
    # Under the other label the two orders change places.
    flipped = torch.tensor(
        [(softplus(2.0) + softplus(-0.5)) / 2, (softplus(-1.0) + math.log(2)) / 2]
    )
    smoothed = 0.9 * torch.tensor(plain) + 0.1 * flipped
    torch.testing.assert_close(losses.pairwise(forth, back, label_smoothing=0.1), smoothed)


def orpo_of_means(chosen, rejected):
    one = torch.tensor(1)
    return losses.orpo(chosen, rejected, beta=0.5, chosen_tokens=one, rejected_tokens=one)


def test_orpo_is_trls():
    orpo_trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    own = SimpleNamespace(beta=0.5, accelerator=SimpleNamespace(device="cpu"))
    means = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -3.0, -60.0])
    theirs, ours = (torch.cartesian_prod(means, means).requires_grad_() for _ in range(2))
    preference, *_ = orpo_trainer.odds_ratio_loss(own, *theirs.T)
    expected = -theirs[:, 0] - preference
    actual = orpo_of_means(*ours.T)
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_where_a_response_is_certain(dtype):
    # The last is what rounding makes of a certain response.
    means = torch.tensor([0.0, -1e-30, -1e-9, -1.0, 1e-8], dtype=dtype)
    pairs = torch.cartesian_prod(means, means).requires_grad_()
    actual = orpo_of_means(*pairs.T)
    actual.sum().backward()
    assert actual.isfinite().all()
    assert pairs.grad.isfinite().all()
    assert (pairs.grad[:, 0] < 0).all()
    assert (pairs.grad[:, 1] > 0).all()
    of_equals = torch.arange(len(means)) * (len(means) + 1)
    torch.testing.assert_close(actual[of_equals], -means + 0.5 * math.log(2))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_constants_of_a_loss_are_flags_and_fields_of_the_config(loss):
    for constant in loss.constants:
        setting = Alignment.model_fields[constant.flag]
        assert setting.default == constant.default
        assert setting.description.startswith(constant.meaning)
        assert constant.argument in inspect.signature(loss.function).parameters
        field = ConfidenceDPOConfig.__dataclass_fields__[constant.config_field]
        if constant.config_field not in DPOConfig.__dataclass_fields__:
            kind = type(constant.default).__name__
            assert (field.type, field.default) == (kind, constant.default)
            assert field.metadata["help"] == f"{constant.meaning}."


@pytest.mark.parametrize("page", ["cluster.md", "command.md", "method.md", "training.md"])
def test_the_tables_in_the_docs_are_those_of_the_code(page):
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / page).read_text()
    assert runpy.run_path(str(docs / "tables.py"))["with_tables"](text) == text
