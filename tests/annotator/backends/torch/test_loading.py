"""Models load without a word that means nothing to a user."""

import subprocess
import sys

import pytest
import torch
from transformers.utils import logging

from cwpo_annotator.backends.torch.loading import load_classifier

LOAD = "import sys; from cwpo_annotator import Annotator; Annotator.load(sys.argv[1], device='cpu')"


@pytest.mark.slow
def test_loading_an_annotator_prints_nothing(folder):
    command = [sys.executable, "-c", LOAD, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_loading_leaves_the_messages_of_transformers_as_they_were(tiny_annotator):
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_classifier(tiny_annotator, dtype=torch.float32, pad_token_id=0)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
