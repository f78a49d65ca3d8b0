"""The Slurm script, under a Slurm of this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cwpo.process import die_with_parent, free_port
from cwpo_trainer.run.folder import read_lines, read_record

SCRIPT = Path(__file__).parents[2] / "deploy" / "training" / "align.slurm"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
SECONDS = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(tool) for tool in TOOLS),
        reason="Slurm (slurm-wlm) is not installed, or this is not root",
    ),
]


class Slurm:
    """A cluster of one node with two GPUs, which are none."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        key, munge = root / "munge.key", root / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for name in ("state", "spool"):
            (root / name).mkdir()
        (root / "slurm.conf").write_text(
            f"""
ClusterName=cwpo
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
SlurmdUser=root
# How long a job that was queued again has to wait.
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
GresTypes=gpu
NodeName=localhost NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""
        )
        (root / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        munged = ("munged", "--foreground", "--force", "--key-file", key, "--socket", munge)
        files = ("--pid-file", root / "munge.pid", "--log-file", root / "munge.log")
        self._daemons = [self._started(*munged, *files, "--seed-file", root / "munge.seed")]
        until(munge.exists)
        self._daemons += [self._started("slurmctld", "-D"), self._started("slurmd", "-D")]
        until(lambda: "idle" in self.said("sinfo", "--noheader", "--format=%T"))

    def said(self, *words: object) -> str:
        """What a command prints, for whatever it did."""
        return subprocess.run(
            [*map(str, words)], env=self.environment, capture_output=True, text=True, check=False
        ).stdout

    def submitted(self, *words: object) -> str:
        """The number of the job that runs the script."""
        done = subprocess.run(
            [*map(str, ("sbatch", "--parsable", "--nodes=1", "--gpus-per-node=2",
              "--cpus-per-task=1", "--mem=0", f"--output={self._root}/job.log", *words))],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        fields = self.said("scontrol", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def log(self) -> str:
        """What the job has printed."""
        path = self._root / "job.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait()

    def _started(self, *words: object) -> subprocess.Popen:
        return subprocess.Popen(
            [*map(str, words)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )


def until(done, describe=str):
    """Waits for what has to come."""
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, describe()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


def test_a_job_whose_time_is_up_goes_on_in_its_next_turn(slurm, tiny_causal, tmp_path):
    rows = [
        {"prompt": f"question {number}?", "chosen": "kind good help", "rejected": "rude bad",
         "confidence": (number % 9 + 1) / 10, "score_chosen": 1.0, "score_rejected": 0.0,
         "preferred": "a"}
        for number in range(400)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, output = tmp_path / "align.yaml", tmp_path / "aligned"
    recipe.write_text(
        f"model: {tiny_causal}\ndata: {tmp_path}/rows.jsonl\noutput: {output}\n"
        "batch_size: 2\ngradient_accumulation: 1\nepochs: 2\nthreads: 1\n"
    )
    job = slurm.submitted(SCRIPT, recipe)
    partial = output.with_name(f".{output.name}.partial")
    until(lambda: len(read_lines(partial / "training.jsonl")) > 5, slurm.log)
    # As Slurm does before the time is up.
    slurm.said("scancel", "--batch", "--signal=USR1", job)
    until(lambda: slurm.job(job)["Restarts"] == "1", slurm.log)
    stopped = len(read_lines(partial / "training.jsonl"))
    assert stopped < 200
    assert "stopped by SIGTERM" in slurm.log()
    until(lambda: slurm.job(job)["JobState"] == "COMPLETED", slurm.log)
    assert [line["step"] for line in read_lines(output / "training.jsonl")] == [*range(1, 201)]
    assert read_record(output).settings["world_size"] == 2
