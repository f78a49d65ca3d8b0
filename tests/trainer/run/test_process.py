from __future__ import annotations

import pytest
import torch

from cwpo_trainer.run.process import use_bfloat16


@pytest.mark.parametrize("is_native", [True, False])
def test_a_gpu_that_emulates_bfloat16_gets_it_only_if_asked(is_native, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or is_native,
    )
    assert use_bfloat16("auto") == is_native
    assert not use_bfloat16("float32")
    assert capsys.readouterr().err == ""
    assert use_bfloat16("bfloat16")
    assert ("only emulates it" in capsys.readouterr().err) != is_native
