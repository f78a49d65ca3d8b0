"""Files of pairs as token ids, tokenised once."""

import copy
import json

import datasets
import numpy as np
import pytest

from cwpo.errors import ConfigError, DatasetError
from cwpo_trainer.data.weighted import PairFile
from cwpo_trainer.policy.alignment import PAIRS
from cwpo_trainer.policy.dataset import Part, in_python, token_file
from cwpo_trainer.policy.fine_tuning import RESPONSES
from cwpo_trainer.policy.formatting import Formatter

from ..samples import pairs, weighted, write_lines

BAD = {"id": "bad", "prompt": "p", "chosen": "a", "rejected": "", "confidence": 0.5}
TIE = {"prompt": "p", "chosen": "same", "rejected": "same", "confidence": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of datasets."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder


def arrow_of(file):
    (cached,) = file.dataset.cache_files
    return cached["filename"]


def test_the_token_ids_are_those_of_the_formatter(tiny_tokenizer, tmp_path):
    rows = weighted(5)
    source = PairFile(write_lines(tmp_path / "w.jsonl", rows))
    file = token_file(source, PAIRS, tiny_tokenizer, max_rejected_share=0)
    formatter = Formatter(tiny_tokenizer)
    found = in_python(file.dataset, "prompt_ids", "chosen_ids", "rejected_ids", "tokens")
    for row, (prompt, chosen, rejected, tokens) in zip(rows, found, strict=True):
        texts = formatter.tokenise([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        wholes = [text.prompt_ids + text.response_ids for text in texts]
        assert [prompt + chosen, prompt + rejected] == wholes
        assert tokens == max(map(len, wholes))
    expected = np.array([row["confidence"] for row in rows], dtype=np.float32)
    assert file.confidences.tolist() == expected.tolist()
    assert file.prompt_pairs is None
    assert file.prompts() == [row["prompt"] for row in rows]
    responses = token_file(source, RESPONSES, tiny_tokenizer, max_rejected_share=0)
    first = responses.dataset[0]
    (text,) = formatter.tokenise([rows[0]["prompt"]], [rows[0]["chosen"]])
    assert first["input_ids"] == text.prompt_ids + text.response_ids
    assert first["labels"] == [-100] * len(text.prompt_ids) + text.response_ids


def test_a_file_is_tokenised_once_for_each_content_reading_and_tokenizer(tiny_tokenizer, tmp_path):
    def made(path, tokenizer=tiny_tokenizer, form=PAIRS, **reading):
        file = token_file(PairFile(path, **reading), form, tokenizer, max_rejected_share=0)
        return arrow_of(file)

    path = write_lines(tmp_path / "w.jsonl", weighted(4))
    first = made(path)
    assert made(write_lines(tmp_path / "same.jsonl", weighted(4))) == first
    assert made(path, copy.deepcopy(tiny_tokenizer)) == first
    templated = copy.deepcopy(tiny_tokenizer)
    templated.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    others = [
        made(write_lines(tmp_path / "other.jsonl", weighted(4, seed=1))),
        made(write_lines(tmp_path / "human.jsonl", pairs(4)), labels="human"),
        made(path, form=RESPONSES),
        made(path, templated),
    ]
    assert len({first, *others}) == 5


def test_what_is_unused_is_known_where_the_file_is_found_again(tiny_tokenizer, tmp_path):
    path = write_lines(tmp_path / "w.jsonl", [*weighted(8), BAD, TIE])
    for _ in range(2):
        file = token_file(PairFile(path), PAIRS, tiny_tokenizer, max_rejected_share=0.1)
        unused = file.unused
        assert (len(file), unused.rows, unused.ties) == (8, 10, 1)
        assert unused.rejected == {"empty_response": 1}
        unused.write(tmp_path)
        (line,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
        assert json.loads(line)["content"] == BAD
    with pytest.raises(DatasetError, match="row 9: response_b is empty; 1 of 10 rows are rejected"):
        token_file(PairFile(path), PAIRS, tiny_tokenizer, max_rejected_share=0.05)


def test_a_file_that_cannot_be_used_leaves_nothing_to_be_found(tiny_tokenizer, tmp_path):
    path = write_lines(tmp_path / "w.jsonl", [*weighted(8), BAD])
    for _ in range(2):
        with pytest.raises(DatasetError, match="row 9"):
            token_file(PairFile(path), PAIRS, tiny_tokenizer, max_rejected_share=0)
    assert len(token_file(PairFile(path), PAIRS, tiny_tokenizer, max_rejected_share=1)) == 8


def test_the_pairs_of_prompts_are_counted_by_the_file(tiny_tokenizer, tmp_path):
    rows = [row | {"prompt_pairs": at + 1} for at, row in enumerate(weighted(3))]
    source = PairFile(write_lines(tmp_path / "w.jsonl", rows))
    file = token_file(source, PAIRS, tiny_tokenizer, max_rejected_share=0)
    assert file.prompt_pairs.tolist() == [1, 2, 3]


def test_a_part_leaves_out_what_is_too_long_and_says_so(tiny_tokenizer, tmp_path, capsys):
    rows = weighted(6)
    rows[2]["chosen"] += " kind" * 50
    source = PairFile(write_lines(tmp_path / "w.jsonl", rows))
    file = token_file(source, PAIRS, tiny_tokenizer, max_rejected_share=0)
    numbered = file.with_numbers(number=np.arange(6))
    part = Part(numbered, np.array([True, False, True, True, True, True]))
    dataset, too_long = part.fitting(60)
    assert (dataset["number"][:], too_long) == ([0, 3, 4, 5], 1)
    assert "1 of 5 pairs left out: 1 too_long" in capsys.readouterr().err
    assert part.fitting(1000).dataset["number"][:] == [0, 2, 3, 4, 5]
    with pytest.raises(DatasetError, match="all 5 pairs are longer than --max-length 2"):
        part.fitting(2)


def test_a_cache_that_cannot_be_written_is_named(cache, tiny_tokenizer, tmp_path):
    cache.write_text("not a folder")
    path = write_lines(tmp_path / "w.jsonl", weighted(2))
    with pytest.raises(ConfigError, match=r"name another folder in HF_DATASETS_CACHE"):
        token_file(PairFile(path), PAIRS, tiny_tokenizer, max_rejected_share=0)
