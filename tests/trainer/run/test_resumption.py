from __future__ import annotations

import pytest

from cwpo.errors import ConfigError
from cwpo_trainer.run.resumption import check_start, inputs_of, note_start

SETTINGS = {"beta": 0.1, "threads": 1, "data": "pairs.jsonl"}


def test_a_run_goes_on_only_as_what_it_was(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("one")

    def inputs(**changed):
        settings = {**SETTINGS, **changed}
        return inputs_of(settings, without_effect={"threads"}, files={"data": data})

    note_start(tmp_path, inputs())
    check_start(tmp_path, inputs(threads=2))
    with pytest.raises(ConfigError, match=r"--resume: beta was 0\.1 .* and is 0\.2 now"):
        check_start(tmp_path, inputs(beta=0.2))
    data.write_text("two")
    with pytest.raises(ConfigError, match="--resume: sha256 of data was"):
        check_start(tmp_path, inputs())


def test_a_run_of_before_a_setting_goes_on_with_its_default(tmp_path):
    note_start(tmp_path, SETTINGS)
    check_start(tmp_path, SETTINGS | {"max_grad_norm": 1.0})
    with pytest.raises(ConfigError, match=r"max_grad_norm was 1\.0 .* and is 0\.5 now"):
        check_start(tmp_path, SETTINGS | {"max_grad_norm": 0.5})


def test_a_folder_of_parts_has_to_be_the_same_too(tmp_path):
    folder = tmp_path / "weighted"
    folder.mkdir()
    (folder / "dataset.json").write_text('{"parts": []}')

    def inputs():
        return inputs_of(SETTINGS, without_effect=(), files={"data": folder})

    note_start(tmp_path, inputs())
    check_start(tmp_path, inputs())
    (folder / "dataset.json").write_text('{"parts": [{}]}')
    with pytest.raises(ConfigError, match="--resume: sha256 of data was"):
        check_start(tmp_path, inputs())
