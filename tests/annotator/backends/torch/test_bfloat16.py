"""bfloat16 gives the labels of float32 on real pairs and a real model."""

import gzip
import json
from itertools import islice

import numpy as np
import torch

from cwpo import Triplet
from cwpo_annotator import Annotator

PAIRS = 40
LONGEST = 600


def short_pairs(path):
    with gzip.open(path, "rt") as lines:
        for row in map(json.loads, lines):
            texts = {name: row[name] for name in ("prompt", "response_a", "response_b")}
            if sum(map(len, texts.values())) <= LONGEST:
                yield Triplet(**texts)


def test_labels_agree_with_float32_where_the_margin_is_above_the_median(data_dir, scalar_head):
    triplets = list(islice(short_pairs(data_dir / "hh_harmless.jsonl.gz"), PAIRS))
    folder = scalar_head("smollm2")

    def margins(dtype):
        annotator = Annotator.load(folder, dtype=dtype, device="cpu")
        return np.array([a.score_a - a.score_b for a in annotator.annotate(triplets)])

    exact, rounded = margins("float32"), margins("bfloat16")
    clear = np.abs(exact) > np.median(np.abs(exact))
    agreement = np.mean(np.sign(exact[clear]) == np.sign(rounded[clear]))
    assert agreement >= 0.995
    # And it is bfloat16 that was compared, not float32 with itself.
    assert np.abs(exact - rounded).max() > torch.finfo(torch.bfloat16).eps / 4


def test_a_real_decoder_shares_prompts_in_bfloat16_too(scalar_head):
    # On processors with other products, rounding alone changes some hidden states by a tenth.
    annotator = Annotator.load(scalar_head("smollm2"), dtype="bfloat16", device="cpu")
    assert annotator.backend.shares_prompts
