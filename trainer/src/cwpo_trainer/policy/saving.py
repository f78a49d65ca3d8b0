"""What is left of a training: a plain model folder, or an adapter, here and on the Hub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from transformers import AutoConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINING_ARGS_NAME

from cwpo_annotator.checkpoint import base_folder, is_adapter, resolve
from cwpo_trainer.policy.adapters import merge, name_base, with_adapter
from cwpo_trainer.policy.loading import load
from cwpo_trainer.policy.trl_training import part_ways
from cwpo_trainer.run import process
from cwpo_trainer.run.folder import ADAPTER_FOLDER, README_NAME

# More of an update than that is worth a warning.
_LOST = 0.1


def save(
    trainer: Any, folder: Path, *, adapts: str | None, adapter_only: bool = False
) -> dict[str, JsonValue]:
    """Write the trained model as a plain one, a LoRA adapter merged and also by itself.

    Args:
        adapts: folder or Hub id of the model that a trained adapter started from; None where all
            weights were trained. The adapter is merged in float32 into its base model as that was
            stored, and the result is rounded to that model's own dtype.
        adapter_only: write the adapter only, into the folder itself.
    Returns: the figures for run.json: what rounding lost, as a share of the update's norm.
    """
    if adapts is None:
        _write(trainer, folder)
        return {}
    adapter = folder if adapter_only else folder / ADAPTER_FOLDER
    _write(trainer, adapter)
    if not process.is_main():
        return {}
    name_base(adapter, adapts)
    generation = trainer.model.generation_config
    generation.save_pretrained(adapter)
    if adapter_only:
        return {}
    # Else the start model would be sharded as well, over processes that have left.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    base = base_folder(resolve(adapts))
    stored = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype or torch.float32
    merged, lost = merge(with_adapter(load(base), adapter), stored)
    merged.generation_config = generation
    merged.to(stored).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    _say_lost(lost, str(stored).removeprefix("torch."))
    return {"update_lost_in_merging": lost}


def _write(trainer: Any, folder: Path) -> None:
    """What was trained, without what says no more than run.json, or nothing."""
    trainer.save_model(str(folder))
    part_ways(trainer)
    if process.is_main():
        # A pickle.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if is_adapter(folder):
            # PEFT's empty form of a model card, and the adapter of the reference model.
            (folder / README_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder / "ref", ignore_errors=True)


def _say_lost(lost: float, stored: str) -> None:
    if not lost:
        return
    text = f"merging the adapter into {stored} weights lost {lost:.1%} of its update to rounding"
    if lost > _LOST:
        text += (
            f"; the folder {ADAPTER_FOLDER} of the output has all of it, and --adapter-only writes "
            "nothing else"
        )
    print(text, file=sys.stderr)
