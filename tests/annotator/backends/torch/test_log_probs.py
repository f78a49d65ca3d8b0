"""Log-probabilities from few logits at a time, against all logits at once."""

from types import SimpleNamespace

import pytest
import torch

from cwpo_annotator.backends.torch.log_probs import Response, log_probs

VOCABULARY, WIDTH = 50, 8
RESPONSES = [
    Response(range(2, 6), [4, 9, 0, 49]),
    Response([2, 7, 8], [1, 1, 30]),
    Response([0], [7]),
]


@pytest.fixture(autouse=True)
def few_logits(monkeypatch):
    """Those of three tokens."""
    few = {"cpu": 3 * VOCABULARY}
    monkeypatch.setattr("cwpo_annotator.backends.torch.log_probs._LOGITS", few)


def model_and_hidden(bias, *, trained):
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trained)
    hidden = torch.randn(10, WIDTH).requires_grad_()
    return SimpleNamespace(get_output_embeddings=lambda: head), head, hidden


def all_at_once(head, hidden):
    found = []
    for response in RESPONSES:
        of_all = head(hidden[list(response.before)]).log_softmax(dim=1)
        entropy = -(of_all.exp() * of_all).sum()
        targets = torch.tensor(response.targets)
        likeliest = (of_all.argmax(dim=1) == targets).sum()
        found.append((of_all.gather(1, targets[:, None]).sum(), entropy, likeliest))
    return [torch.stack(of) for of in zip(*found, strict=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_are_those_of_all_logits_at_once(bias, trained):
    model, head, hidden = model_and_hidden(bias, trained=trained)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    found = log_probs(model, hidden, RESPONSES, with_figures=True)
    expected = all_at_once(head, hidden)
    for of, of_expected in zip(found, expected, strict=True):
        torch.testing.assert_close(of, of_expected.float(), rtol=1e-5, atol=1e-5)
    along = torch.tensor([0.3, -2.0, 5.0])
    gradients = torch.autograd.grad(found.sums @ along, inputs)
    of_expected = torch.autograd.grad(expected[0] @ along, inputs)
    for gradient, oracle in zip(gradients, of_expected, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_head_itself_is_asked():
    model, head, hidden = model_and_hidden(True, trained=True)
    with torch.no_grad():
        found = log_probs(model, hidden, RESPONSES)
    torch.testing.assert_close(found.sums, all_at_once(head, hidden)[0])
    assert found.entropies is None
