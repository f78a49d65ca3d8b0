"""`python -m cwpo_trainer.online` of which each process saves its own weights, too.

usage: online_worker.py FOLDER FLAG...: writes FOLDER/0.pt, FOLDER/1.pt and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from cwpo_trainer.commands import Online
from cwpo_trainer.run import process
from cwpo_trainer.run.launch import main


class SaveOwnWeights(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        torch.save(model.state_dict(), Path(folder) / f"{process.rank()}.pt")


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    DEFAULT_CALLBACKS.append(SaveOwnWeights)
    main(Online, "online_worker.py")
