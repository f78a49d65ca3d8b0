"""What a step trains on: whole prompts where they fit, in an order that the seed alone decides."""

import random
from dataclasses import dataclass
from itertools import chain, pairwise

import pytest
import torch

from cwpo_trainer.annotators.checkpoints import Checkpoints
from cwpo_trainer.annotators.forward import PassBudget
from cwpo_trainer.annotators.ranks import Ranks
from cwpo_trainer.annotators.train_loop import Stage, TrainLoop
from cwpo_trainer.settings.annotator_training import AnnotatorTraining

SEED = 3


@dataclass(frozen=True)
class Example:
    prompt: int
    number: int
    tokens: int = 5


class Recorded:
    """An objective that remembers what it was asked for."""

    figures = ("loss",)

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)
        self.steps = []

    def passes(self, examples):
        self.steps.append(examples)
        return [lambda: self.model(torch.ones(len(examples), 1)).T]


@pytest.fixture
def trained(tmp_path):
    """`trained(examples, steps)`: the examples of each step."""

    def train(examples, steps, *, batch_size, ranks=None):
        settings = AnnotatorTraining(model="m", data="d", output=tmp_path / "out")
        loop = TrainLoop(
            optimisation=settings,
            batch_size=batch_size,
            schedule="linear",
            seed=SEED,
            save_steps=None,
            ranks=ranks or Ranks(0, 1, torch.device("cpu")),
            budget=PassBudget(None, "cpu"),
            checkpoints=Checkpoints(tmp_path, None),
        )
        objective = Recorded()
        prompts = [str(example.prompt) for example in examples]
        loop.run(Stage("annotator", objective, examples, prompts, steps, tmp_path / "log.jsonl"))
        return objective.steps

    return train


def examples(prompts, of_each):
    """Those of a prompt lie far apart."""
    return [Example(prompt, number) for number in range(of_each) for prompt in range(prompts)]


def test_the_examples_of_a_prompt_are_trained_one_after_the_other(trained):
    found = examples(prompts=9, of_each=4)
    steps = trained(found, 2 * 6, batch_size=6)
    assert [len(step) for step in steps] == [6] * 12
    epochs = [[*chain(*steps[at : at + 6])] for at in (0, 6)]
    for epoch in epochs:
        assert sorted(epoch, key=found.index) == found
        changes = sum(before.prompt != after.prompt for before, after in pairwise(epoch))
        assert changes == 8
    assert epochs[0] != epochs[1]
    assert trained(found, 12, batch_size=6) == steps


def test_examples_of_different_prompts_are_shuffled_as_ever(trained):
    found = examples(prompts=10, of_each=1)
    order = random.Random(SEED)
    expected = []
    for _ in range(2):
        epoch = [*found]
        order.shuffle(epoch)
        expected += [epoch[:4], epoch[4:8], epoch[8:]]
    assert trained(found, 6, batch_size=4) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_a_step_without_parting_neighbours(size):
    draw = random.Random(0)
    step = [Example(prompt, number, draw.randint(1, 99)) for prompt in range(5) for number in "ab"]
    shares = [Ranks(rank, size, torch.device("cpu")).share(step) for rank in range(size)]
    assert [*chain(*shares)] == step
    sizes = [sum(example.tokens for example in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * 99
