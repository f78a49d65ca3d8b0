"""The annotator's check of `cwpo doctor`: torch, and the device that it computes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cwpo.errors import first_line
from cwpo.findings import Finding, Places

_NVIDIA = Path("/proc/driver/nvidia/version")


def annotator(places: Places) -> Iterator[Finding]:
    """Whether torch computes, and on which device."""
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("ok", "torch", f"{torch.__version__}, built {built}")
    if torch.cuda.is_available():
        yield from gpus()
    elif torch.backends.mps.is_available():
        yield Finding("ok", "gpu", "Apple's, by MPS")
    else:
        yield no_gpu(
            is_built=torch.version.cuda is not None,
            is_there=_NVIDIA.exists(),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )


def gpus() -> Iterator[Finding]:
    """Each GPU, on which something is computed."""
    import torch

    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            said = f"{index} ({name}) cannot be used: {first_line(error)}"
            fix = "end other processes on it (`nvidia-smi`), or install a build of torch for it"
            yield Finding("wrong", "gpu", said, fix)
            continue
        said = f"{index}: {name}, {free / 2**30:,.0f} of {total / 2**30:,.0f} GiB free"
        yield Finding("ok", "gpu", said)


def no_gpu(*, is_built: bool, is_there: bool, visible: str | None) -> Finding:
    """Why torch sees no GPU.

    Args:
        is_built: whether this torch can use CUDA.
        is_there: whether a driver of NVIDIA is loaded.
        visible: CUDA_VISIBLE_DEVICES.
    """
    if not is_there:
        return Finding("ok", "gpu", "there is none: the CPU computes")
    if not is_built:
        fix = "install torch for CUDA: https://pytorch.org/get-started/locally/"
        return Finding("wrong", "gpu", "there is one, and this torch cannot use it", fix)
    if visible is not None:
        said = f"CUDA_VISIBLE_DEVICES={visible} hides it: the CPU computes"
        return Finding("warning", "gpu", said, "unset CUDA_VISIBLE_DEVICES")
    fix = "compare the driver (`nvidia-smi`) with the CUDA that torch was built for"
    return Finding("wrong", "gpu", "there is one, and torch does not see it", fix)
