"""What a run says that it needs, and what it takes."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def peak(profiler):
    """The most bytes that tensors held at once."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def assert_near_peak(plan, run, tolerance):
    """What the plan says that the run takes on a CPU is near what its tensors take."""
    estimated = plan.memory(on_cpu=True)
    expected = estimated.total - estimated.process
    # What earlier tests held would be counted where it is freed.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    print(f"{expected / 2**20:.1f} MiB estimated, {peak(measured) / 2**20:.1f} measured")
    assert expected == pytest.approx(peak(measured), rel=tolerance)


def planned(capsys):
    """The tokens and steps that a dry run said."""
    text = " ".join(capsys.readouterr().out.split())
    tokens = int(re.search(r"texts [\d,]+, ([\d,]+) tokens", text)[1].replace(",", ""))
    steps = int(re.search(r"steps ([\d,]+),", text)[1].replace(",", ""))
    return tokens, steps


def counted_by_torch(run):
    """Operations of all matrix products, those of attention with them, and those into gradients."""

    def into(_, left, right, *args, out_shape=None, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: into})
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()
