"""Trains annotators and aligns strong models on confidence-weighted preferences."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

# TRL and the Hub's client report usage over the network unless told not to before import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# PEFT imports bitsandbytes, which then asks for a package that would make its inference faster.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from cwpo_trainer.policy.confidence_dpo import ConfidenceDPOConfig, ConfidenceDPOTrainer

__all__ = ["ConfidenceDPOConfig", "ConfidenceDPOTrainer"]


def __getattr__(name: str) -> Any:
    # Importing TRL takes seconds: `cwpo --help`, which passes here, must not wait for it.
    if name in __all__:
        from cwpo_trainer.policy import confidence_dpo

        return getattr(confidence_dpo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
