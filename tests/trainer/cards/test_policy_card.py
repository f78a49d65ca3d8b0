"""What the card of a policy says, read as the Hub reads it."""

from __future__ import annotations

import getpass
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cwpo.datasets.weighted import weighted_writer
from cwpo.types import ModelRef
from cwpo_trainer.cards.origin import origin
from cwpo_trainer.commands import Align, Sft

from ..samples import pairs, weighted, write_lines

SMALL = (
    *("--batch-size", 8, "--gradient-accumulation", 1, "--dtype", "float32", "--max-steps", 1),
    *("--threads", 1),
)


def card_of(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    # What is read is what would be written.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert not re.search(r"(^|[\s`\"'(])/\w", card.text), card.text
    for private in (str(folder), str(folder.parent), str(Path.home()), f"/{getpass.getuser()}"):
        assert private not in str(card)
    return card


def row(card: ModelCard, name: str) -> str | None:
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card.text, re.MULTILINE)
    return found and found[1]


@pytest.fixture
def start(tiny_causal, tmp_path):
    """A clone of a model of the Hub, with its card."""
    folder = tmp_path / "start"
    folder.mkdir()
    for path in tiny_causal.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-research\nlicense_link: LICENSE\n"
        "base_model: owner/tiny\n---\n# Tiny\n"
    )
    return folder


@pytest.mark.slow
def test_an_aligned_policy(start, tmp_path, command):
    rows = [{**one, "preferred": "a"} for one in weighted(20)]
    rows[3] |= {"confidence": 0.0, "preferred": "tie"}
    rows[5] |= {"chosen": ""}
    for at in (7, 8, 9, 10):
        rows[at] |= {"chosen": "please " * 100}
    judge = ModelRef(name="tiny-judge", revision="0123456789ab")
    data = tmp_path / "weighted.parquet"
    with data.open("wb") as sink, weighted_writer(sink, "parquet", judge) as writer:
        writer.write(rows)
    command(
        Align,
        *("--model", start, "--data", data, "--output", tmp_path / "out", *SMALL),
        *("--loss", "ipo", "--tau", 0.3, "--normalise", "--eval-fraction", 0.3),
        *("--max-length", 90, "--max-rejected-share", 0.5),
    )
    card = card_of(tmp_path / "out")
    fields = card.data.to_dict()
    assert fields["base_model"] == "owner/tiny"
    assert fields["base_model_relation"] == "finetune"
    assert fields["library_name"] == "transformers"
    assert {"trl", "cwpo", "cw-ipo"} <= {*fields["tags"]}
    assert (fields["license"], fields["license_name"]) == ("other", "tiny-research")
    assert "before publishing" not in card.text
    assert row(card, "loss").startswith("`ipo` (eq. 10), tau 0.3")
    assert (
        row(card, "weight of a pair") == "`confidence`: C itself, as in eq. 8; divided by the mean"
    )
    assert "`tiny-judge`, revision `0123456789ab`" in row(card, "labelled by")
    # Some of the long ones are held out.
    assert re.fullmatch("1 empty_response, [1-4] too_long, 1 tie", row(card, "rows left out"))
    assert re.fullmatch("`[0-9a-f]{64}`", row(card, "SHA-256 of the file"))
    assert float(row(card, "evaluation loss")) > 0
    assert row(card, "mean weight")
    assert re.search(r"Versions: python 3.*transformers \d.*trl \d", card.text)


@pytest.mark.slow
def test_what_is_not_known_has_to_be_filled_in(tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(16))
    flags = ("--model", tiny_causal, "--data", data, "--labels", "human", *SMALL)
    command(Align, *flags, "--output", tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert not {"base_model", "license"} & card.data.to_dict().keys()
    assert re.findall("fill in `(.*)` above before publishing", card.text) == [
        "base_model",
        "license",
    ]
    assert row(card, "labelled by") == "people"
    # Confidence has no part in it.
    assert "dpo" in card.data.tags
    assert "CW-" not in card.text


@pytest.mark.slow
def test_adapters_and_those_that_are_trained_further(start, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    flags = ("--data", data, *SMALL, "--lora")
    command(Sft, *flags, "--model", start, "--adapter-only", "--output", tmp_path / "sft")
    command(Align, *flags, "--model", tmp_path / "sft", "--output", tmp_path / "out")
    adapter, merged = card_of(tmp_path / "sft"), card_of(tmp_path / "out")
    beside = card_of(tmp_path / "out" / "adapter")
    for card in (adapter, merged, beside):
        assert card.data.base_model == "owner/tiny"
        assert card.data.license_name == "tiny-research"
        assert row(card, "LoRA") == "rank 8, alpha 16"
    for card in (adapter, beside):
        assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert (merged.data.library_name, merged.data.base_model_relation) == (
        "transformers",
        "finetune",
    )
    assert row(merged, "update lost in merging the adapter")
    assert "sft" in adapter.data.tags


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora", "--adapter-only")])
def test_the_code_in_it_runs(more, tiny_causal, tmp_path, command):
    data = write_lines(tmp_path / "weighted.jsonl", weighted(16))
    flags = ("--model", tiny_causal, "--data", data, *SMALL, "--output", tmp_path / "out")
    command(Sft, *flags, *more)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "out").text, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)


def test_a_folder_that_was_uploaded_is_named_by_its_repository(start):
    record = (
        '{"kind": "sft", "settings": {"push_to_hub": "me/tiny-sft"}, "results": {}, "seconds": 1,'
        ' "started_at": "2026-01-01T00:00:00Z"}'
    )
    assert origin(str(start))[:2] == ("owner/tiny", False)
    (start / "run.json").write_text(record)
    assert origin(str(start))[:2] == ("me/tiny-sft", True)


@pytest.mark.parametrize("text", ["# No fields", "---\n: [\n---\n", "---\n- a list\n---\n", ""])
def test_a_card_of_others_that_cannot_be_read_says_nothing(text, start):
    (start / "README.md").write_text(text)
    assert origin(str(start)) == (None, False, {})
