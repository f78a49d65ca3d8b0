"""What `cwpo doctor` says where torch sees no GPU."""

import pytest

from cwpo.findings import Places
from cwpo_annotator.checks import annotator, no_gpu


@pytest.mark.parametrize(
    ("is_built", "is_there", "visible", "level", "fix"),
    [
        (True, False, None, "ok", None),
        (False, False, "", "ok", None),
        (False, True, None, "wrong", "install torch for CUDA"),
        (True, True, "", "warning", "unset CUDA_VISIBLE_DEVICES"),
        (True, True, None, "wrong", "nvidia-smi"),
    ],
)
def test_why_there_is_no_gpu_is_told_apart(is_built, is_there, visible, level, fix):
    found = no_gpu(is_built=is_built, is_there=is_there, visible=visible)
    assert found.level == level
    assert found.fix is None if fix is None else fix in found.fix


def test_torch_and_a_device_are_found():
    import torch

    found = list(annotator(Places("http://127.0.0.1:9")))
    assert found[0].said.startswith(f"{torch.__version__}, built ")
    assert {finding.subject for finding in found} == {"torch", "gpu"}
    assert all(finding.level == "ok" for finding in found if torch.cuda.is_available())
