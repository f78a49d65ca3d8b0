from __future__ import annotations

import shutil

import pytest

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.checkpoint import read_card, write_card
from harness import serving


@pytest.fixture(scope="module")
def url(tiny_annotator, tmp_path_factory):
    """Of a service whose annotator was sure of nothing on its held-out pairs."""
    folder = tmp_path_factory.mktemp("online") / "annotator"
    shutil.copytree(tiny_annotator, folder)
    card = read_card(folder)
    write_card(folder, card.model_copy(update={"confidence_quantiles": [0.0] * 11}))
    with serving(lambda: Annotator.load(folder, device="cpu")) as service:
        yield service.url
