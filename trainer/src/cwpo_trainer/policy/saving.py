"""What is left of a training: a plain model folder, here and on the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers import AutoConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINING_ARGS_NAME

from cwpo.errors import CwpoError, first_line
from cwpo_annotator.checkpoint import resolve
from cwpo_trainer.policy.loading import load
from cwpo_trainer.policy.trl_training import part_ways
from cwpo_trainer.run import process


def save(trainer: Any, folder: Path, *, adapts: str | None) -> None:
    """Write the trained model as a plain one.

    Args:
        adapts: folder or Hub id of the model that a trained LoRA adapter belongs to; None where all
            weights were trained. The adapter is merged in float32 into that model as it was stored,
            so that small changes survive, and the result has that model's own dtype.
    """
    if adapts is None:
        trainer.save_model(str(folder))
        part_ways(trainer)
        # A pickle, and of nothing that run.json does not say.
        if process.is_main():
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        return
    adapter = folder / "adapter"
    trainer.save_model(str(adapter))
    part_ways(trainer)
    if not process.is_main():
        return
    # Else the start model would be sharded as well, over processes that have left.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    start = resolve(adapts)
    merged = PeftModel.from_pretrained(load(start), adapter).merge_and_unload()
    stored = AutoConfig.from_pretrained(start, trust_remote_code=False).dtype or torch.float32
    merged.generation_config = trainer.model.generation_config
    merged.to(stored).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    shutil.rmtree(adapter)


def push(folder: Path, repository: str | None) -> None:
    """Upload the finished folder to the Hub, where a repository (owner/name) is given.

    Raises: CwpoError if the upload to the Hub fails; the folder remains.
    """
    if repository is None or not process.is_main():
        return
    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}"
        )
    except (HfHubHTTPError, OSError) as error:
        raise CwpoError(
            f"{folder} is complete, but the upload to the Hub failed: {first_line(error)}; "
            f"upload it with `hf upload {repository} {folder}`"
        ) from error
