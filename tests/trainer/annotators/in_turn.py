"""Several runs of `cwpo train-annotator` in the processes of one torchrun, which import torch once.

usage: in_turn.py FOLDER: FOLDER/runs.json has the flags of each run by name, and the tokens that
the second process has memory for, or null. What a process prints in a run goes to NAME.RANK.txt in
the folder, and its exit code to the last line of it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from little_memory import memory_for

from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.run import launch, process


def main(folder: Path) -> None:
    # Loaded before the processes part.
    import datasets  # noqa: F401
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    import cwpo_trainer.annotators.pipeline  # noqa: F401

    runs = json.loads((folder / "runs.json").read_text())
    # A group cannot be made anew in the store of torchrun: each run has one of its own.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for name, (flags, tokens, port) in runs.items():
        os.environ["MASTER_PORT"] = str(port)
        with (folder / f"{name}.{os.environ['RANK']}.txt").open("w") as said:
            child = os.fork()
            if not child:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                run(flags, tokens)
            _, status = os.waitpid(child, 0)
            said.seek(0, os.SEEK_END)
            said.write(f"\nexit code {os.waitstatus_to_exitcode(status)}\n")


def run(flags: list[str], tokens: int | None) -> None:
    sys.argv = ["train_annotator", *flags]
    is_little = tokens is not None and not process.is_main()
    try:
        with memory_for(tokens) if is_little else nullcontext():
            launch.main(TrainAnnotator, "train_annotator")
    finally:
        launch.leave(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
