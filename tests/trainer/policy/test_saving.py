"""Uploading the finished model to the Hub."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from ..hub import REPOSITORY, Hub, with_hub
from ..samples import weighted, write_lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "weights"),
    [((), "model.safetensors"), (("--lora", "--adapter-only"), "adapter_model.safetensors")],
)
def test_the_finished_model_is_uploaded(more, weights, hub, tiny_causal, tmp_path):
    output = tmp_path / "cw-dpo"
    data = write_lines(tmp_path / "weighted.jsonl", weighted(8))
    flags = ("--model", tiny_causal, "--data", data, "--output", output, "--threads", 1)
    words = map(str, (*flags, *more, "--max-steps", 1, "--push-to-hub", REPOSITORY))
    done = with_hub(hub, "-m", "cwpo_trainer.align", *words)
    assert done.returncode == 0, done.stderr
    (created,) = Hub.created
    assert (created["name"], created["organization"]) == ("cw-dpo", "owner")
    assert created.get("private") or created.get("visibility") == "private"
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    assert Hub.files == written
    assert weights in written
    card = ModelCard(Hub.files["README.md"].decode())
    assert {"cwpo", "trl", "cw-dpo"} <= {*card.data.tags}
    # The repository is what its code loads.
    assert f'from_pretrained("{REPOSITORY}"' in card.text
    assert str(tmp_path) not in str(card)
    # An adapter without its base model is of no use to others.
    assert ("base model is the folder" in done.stderr) == bool(more)
    assert not [name for name in written if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.slow
def test_a_card_that_the_hub_refuses_is_named(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n# A policy\n")
    Hub.mistakes = [{"message": '"license" must be one of the known ones'}]
    code = (
        "from pathlib import Path\n"
        "from cwpo.errors import CwpoError\n"
        "from cwpo_trainer.hub import push\n"
        "try:\n"
        f"    push(Path({str(tmp_path)!r}), {REPOSITORY!r})\n"
        "except CwpoError as error:\n"
        "    print(error)\n"
    )
    done = with_hub(hub, "-c", code)
    assert '"license" must be one of the known ones' in done.stdout, done.stderr
    assert "is complete, but the upload" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not Hub.files
