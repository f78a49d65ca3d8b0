"""Align a policy with Ray Train, on the GPUs of a Ray cluster.

    python examples/ray/align.py --workers 4 --config align.yaml --resume

Each worker runs `cwpo align` with all flags that are not this script's, as torchrun would have it
run: with a rank of its own and the address of the first worker. When a worker is lost, Ray starts
all of them again; with --resume they go on from the last checkpoint.

Without RAY_ADDRESS, Ray is started on this machine. On a cluster, the model, the data and the
output have to be on a file system that all machines share.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util import get_node_ip_address
from torch import distributed

from cwpo.process import die_with_parent, free_port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, one for each GPU")
    parser.add_argument("--cpus", type=int, default=1, help="cores of each worker")
    parser.add_argument("--retries", type=int, default=3, help="times that all may start again")
    parser.add_argument("--storage", type=Path, help="folder for Ray's own records")
    arguments, flags = parser.parse_known_args()
    trainer = TorchTrainer(
        align,
        train_loop_config={"flags": flags},
        scaling_config=ScalingConfig(
            num_workers=arguments.workers,
            use_gpu=torch.cuda.is_available(),
            resources_per_worker={"CPU": arguments.cpus},
        ),
        run_config=RunConfig(
            storage_path=None if arguments.storage is None else str(arguments.storage.resolve()),
            failure_config=FailureConfig(max_failures=arguments.retries),
        ),
    )
    trainer.fit()


def align(settings: dict[str, list[str]]) -> None:
    """Run `cwpo align` beside Ray's worker, whose main thread is not free for signals.

    The worker has the ranks in its environment, and a process group, by which all learn where that
    of their `cwpo align` is to meet.
    """
    place = [f"{get_node_ip_address()}:{free_port()}"]
    distributed.broadcast_object_list(place)
    address, _, port = place[0].rpartition(":")
    ended = subprocess.run(
        [sys.executable, "-m", "cwpo_trainer.align", *settings["flags"]],
        env=os.environ | {"MASTER_ADDR": address, "MASTER_PORT": port},
        preexec_fn=die_with_parent(),
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"cwpo align ended with {ended.returncode}: its log says why")


if __name__ == "__main__":
    main()
