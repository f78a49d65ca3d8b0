"""Several runs of training commands in the processes of one torchrun, which import torch once.

usage: in_turn.py FOLDER: FOLDER/runs.json has a list of runs: name, command, flags, and the
tokens that the second process has memory for, or null. What a process prints in a run goes to
NAME.RANK.txt in the folder, and its exit code to the last line of it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

from cwpo.process import free_port

COMMANDS = {
    "align": "Align",
    "sft": "Sft",
    "online": "Online",
    "train-annotator": "TrainAnnotator",
}


def main(folder: Path) -> None:
    # Loaded before the processes part.
    import datasets  # noqa: F401
    from torch.distributed import TCPStore
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    import cwpo_trainer.annotators.pipeline
    import cwpo_trainer.policy.immediate_updates  # noqa: F401

    # A group cannot be made anew in the store of torchrun: each run has one of its own.
    of_torchrun = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for each in json.loads((folder / "runs.json").read_text()):
        if os.environ["RANK"] == "0":
            of_torchrun.set(each["name"], str(free_port()))
        os.environ["MASTER_PORT"] = of_torchrun.get(each["name"]).decode()
        with (folder / f"{each['name']}.{os.environ['RANK']}.txt").open("w") as said:
            child = os.fork()
            if not child:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                run(each["command"], each["flags"], each["tokens"])
            _, status = os.waitpid(child, 0)
            said.seek(0, os.SEEK_END)
            said.write(f"\nexit code {os.waitstatus_to_exitcode(status)}\n")


def run(command: str, flags: list[str], tokens: int | None) -> None:
    from annotators.little_memory import memory_for
    from fsdp2_on_cpus import allow_fsdp2

    from cwpo_trainer import commands
    from cwpo_trainer.run import launch, process

    sys.argv = [command, *flags]
    is_little = tokens is not None and not process.is_main()
    # Of `online` in the file of --align.
    if command != "train-annotator" and any(
        each.endswith(("fsdp2", "fsdp2.yaml")) for each in flags
    ):
        allow_fsdp2()
    try:
        with memory_for(tokens) if is_little else nullcontext():
            launch.main(getattr(commands, COMMANDS[command]), command)
    except Exception:
        traceback.print_exc()
    finally:
        launch.leave(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
