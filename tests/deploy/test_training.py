"""Training on a cluster: the manifests, and the steps of the pipeline."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from published_schemas import check

from cwpo import Client
from cwpo.exit_codes import ExitCode
from cwpo_trainer.run.folder import read_lines, read_record
from harness import Up
from machines import network

TRAINING = Path(__file__).parents[2] / "deploy" / "training"
PREEMPTED = [{"type": "DisruptionTarget"}]
# Secrets that the manifests say have to be there.
SECRETS = {"cwpo-pipeline"}


def objects(name):
    return [*yaml.safe_load_all((TRAINING / name).read_text())]


def one(name, kind):
    (found,) = [item for item in objects(name) if item["kind"] == kind]
    return found


def steps():
    """The Jobs of the pipeline, in the order in which it starts them."""
    found = {job["name"]: job for job in one("pipeline.yaml", "JobSet")["spec"]["replicatedJobs"]}
    after = {
        before["name"]: name for name, job in found.items() for before in job.get("dependsOn", ())
    }
    (name,) = found.keys() - after.values()
    ordered = [name]
    while name in after:
        name = after[name]
        ordered.append(name)
    assert ordered == [*found]
    return [found[name] for name in ordered]


def pods():
    """The pods of all manifests, by the file and the name of their container."""
    (patch,) = one("trainjob.yaml", "TrainJob")["spec"]["runtimePatches"]
    (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    (node,) = one("jobset.yaml", "JobSet")["spec"]["replicatedJobs"]
    return {
        "job": one("job.yaml", "Job")["spec"]["template"]["spec"],
        "trainjob": patched["template"]["spec"]["template"]["spec"],
        "jobset": node["template"]["spec"]["template"]["spec"],
    } | {job["name"]: job["template"]["spec"]["template"]["spec"] for job in steps()}


@pytest.mark.parametrize(
    "name", ["config.yaml", "job.yaml", "jobset.yaml", "trainjob.yaml", "pipeline.yaml"]
)
def test_objects_fit_the_api(name):
    for item in objects(name):
        check(item)


def test_all_manifests_are_checked():
    checked = {"config", "job", "jobset", "trainjob", "pipeline"}
    assert {path.stem for path in TRAINING.glob("*.yaml")} - {"skypilot"} == checked


@pytest.mark.parametrize("name", pods())
def test_pods_run_without_privileges(name):
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    if name != "trainjob":  # Its Trainer says the same, in its own fields.
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]


def test_what_pods_mount_and_read_is_there():
    maps = {item["metadata"]["name"] for name in ("config.yaml", "pipeline.yaml")
            for item in objects(name) if item["kind"] == "ConfigMap"}  # fmt: skip
    claim = one("config.yaml", "PersistentVolumeClaim")["metadata"]["name"]
    for pod in pods().values():
        for volume in pod["volumes"]:
            assert volume.get("configMap", {"name": "cwpo-align"})["name"] in maps
            assert volume.get("persistentVolumeClaim", {"claimName": claim})["claimName"] == claim
        for variable in pod["containers"][0].get("env", ()):
            secret = variable.get("valueFrom", {}).get("secretKeyRef", {"name": "cwpo-pipeline"})
            assert secret["name"] in SECRETS


def test_nodes_are_launched_by_torchrun_with_the_same_config():
    trainer = one("trainjob.yaml", "TrainJob")["spec"]["trainer"]
    for name in ("job", "jobset"):
        (node,) = pods()[name]["containers"]
        assert node["command"] == trainer["command"]
        folder, _, file = node["command"][-1].rpartition("/")
        (mount,) = [mount for mount in node["volumeMounts"] if mount["name"] == "config"]
        assert mount["mountPath"] == folder
    assert trainer["command"][0] == "torchrun"
    assert trainer["command"][3:5] == ["-m", "cwpo_trainer.align"]
    settings = yaml.safe_load(one("config.yaml", "ConfigMap")["data"][file])
    assert settings["weight"] == "confidence"
    assert settings["world_size"] == trainer["numNodes"]


def test_a_large_checkpoint_has_its_time_after_sigterm():
    """torchrun by itself kills its processes after 30 s, and Kubernetes kills torchrun."""
    command = one("trainjob.yaml", "TrainJob")["spec"]["trainer"]["command"]
    seconds = int(command[command.index("--shutdown-timeout") + 1])
    # 7B parameters with both of AdamW's moments, in float32, at 200 MB/s.
    assert seconds > 3 * 4 * 7e9 / 200e6
    for pod in pods().values():
        assert pod["terminationGracePeriodSeconds"] >= seconds + 30
    script = (TRAINING / "align.slurm").read_text()
    assert f"--shutdown-timeout {seconds} " in script
    assert f"--signal=B:USR1@{seconds + 60}" in script
    assert f"--shutdown-timeout {seconds} " in (TRAINING / "skypilot.yaml").read_text()


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("align", one("config.yaml", "ConfigMap")["data"]["align.yaml"]),
        *[
            (command, one("pipeline.yaml", "ConfigMap")["data"][f"{name}.yaml"])
            for name, command in [
                ("annotator", "train-annotator"), ("sft", "sft"), ("align", "align"),
            ]
        ],
    ],
)  # fmt: skip
def test_settings_are_known_to_the_command(settings, command, text):
    assert yaml.safe_load(text).keys() <= settings(command).keys()


@pytest.mark.parametrize("name", ["job", "jobset"])
def test_nodes_find_one_another(name):
    if name == "job":
        job = one("job.yaml", "Job")
        service = one("job.yaml", "Service")
        spec, pod = job["spec"], pods()["job"]
        first = f"{job['metadata']['name']}-0.{pod['subdomain']}"
        assert service["metadata"]["name"] == pod["subdomain"]
        assert service["spec"]["publishNotReadyAddresses"] is True
    else:
        jobset = one("jobset.yaml", "JobSet")
        (node,) = jobset["spec"]["replicatedJobs"]
        spec, pod = node["template"]["spec"], pods()["jobset"]
        # Its controller makes this service, and gives the pods these names.
        first = f"{jobset['metadata']['name']}-{node['name']}-0-0.{jobset['metadata']['name']}"
    (container,) = pod["containers"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert int(env["PET_NNODES"]) == spec["completions"] == spec["parallelism"]
    assert int(env["PET_NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["PET_MASTER_ADDR"] == first
    assert spec["completionMode"] == "Indexed"


def test_a_lost_node_begins_all_nodes_again():
    spec = one("jobset.yaml", "JobSet")["spec"]
    (node,) = spec["replicatedJobs"]
    job = node["template"]["spec"]
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onPodConditions": PREEMPTED}
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    config = yaml.safe_load(one("config.yaml", "ConfigMap")["data"]["align.yaml"])
    assert config["resume"] is True


def test_a_step_that_was_stopped_is_begun_again():
    settings = one("pipeline.yaml", "ConfigMap")["data"]
    for job in steps():
        rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
        assert all(rule["action"] == "Ignore" for rule in rules)
        preempted, stopped = rules
        assert preempted["onPodConditions"] == PREEMPTED
        assert stopped["onExitCodes"]["values"] == [ExitCode.STOPPED]
    for name in ("annotator", "sft", "align"):
        assert yaml.safe_load(settings[f"{name}.yaml"])["resume"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["job", "jobset"])
def test_two_machines_train_together(name, tiny_causal, tmp_path):
    """The containers of both nodes, on two machines of one network."""
    (container,) = pods()[name]["containers"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    config = yaml.safe_load(one("config.yaml", "ConfigMap")["data"]["align.yaml"])
    data, output = tmp_path / "weighted.jsonl", tmp_path / "aligned"
    written(data, [row | {"confidence": (number % 9 + 1) / 10, "preferred": "a",
                          "score_chosen": 1.0, "score_rejected": 0.0}
                   for number, row in enumerate(labelled(64, right=1))])  # fmt: skip
    small = {"model": str(tiny_causal), "data": str(data), "output": str(output), "threads": 1,
             "batch_size": 4, "gradient_accumulation": 1, "max_steps": 4}  # fmt: skip
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(config | small))
    _, *words = [word.replace("/config", str(tmp_path)) for word in container["command"]]
    launch = [sys.executable, "-m", "torch.distributed.run", *words]
    with network() as machines:
        nodes = [machines.add(f"node-{rank}") for rank in (0, 1)]
        for node in nodes:
            first = nodes[0].address
            node.know({given["PET_MASTER_ADDR"]: first, socket.gethostname(): node.address})
        running = []
        for rank, node in enumerate(nodes):
            environment = os.environ | given | {"PET_NODE_RANK": str(rank)}
            with (tmp_path / f"node-{rank}.log").open("w") as log:
                running.append(node.start(launch, env=environment, stdout=log, stderr=log))
        codes = [each.wait(300) for each in running]
    said = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("node-*.log")}
    assert codes == [0, 0], said
    assert read_record(output).settings["world_size"] == 2
    assert len(read_lines(output / "training.jsonl")) == 4


def labelled(count, *, right):
    """Pairs of a kind and a rude answer, of which this share is labelled kind."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        answers = ["please thanks kind good help", "no rude bad why"]
        if draw.random() > right:
            answers.reverse()
        rows.append(
            {"prompt": f"question number {number}?", "chosen": answers[0], "rejected": answers[1]}
        )
    return rows


def triplets(count):
    for row in labelled(count, right=0.5):
        yield {
            "prompt": f"and {row['prompt']}",
            "response_a": row["chosen"],
            "response_b": row["rejected"],
        }


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SMALL = {
    "annotator": {
        "epochs": 6, "batch_size": 16, "learning_rate": 1e-2, "held_out_fraction": 0.4,
        "max_length": 128,
    },
    "sft": {"max_steps": 2, "batch_size": 4, "max_length": 128},
    "align": {"max_steps": 2, "batch_size": 4, "max_length": 128},
}  # fmt: skip


class Pipeline:
    """The containers of the pipeline as processes, one after the other, on small models.

    places: what is mounted in a container, by its path there.
    """

    def __init__(self, root, models, url):
        self.data = root / "data"
        self.url = url
        self.more = {
            "evaluation": ["--judge", models["evaluation"], "--prompts", 4, "--max-new-tokens", 4]
        }
        self.places = {"/config": root / "config", "/data": self.data, "/models": self.data}
        self.data.mkdir()
        (root / "config").mkdir()
        for file, text in one("pipeline.yaml", "ConfigMap")["data"].items():
            given = yaml.safe_load(self._placed(text)) | SMALL.get(Path(file).stem, {})
            if not given["model"].startswith("/"):
                given["model"] = str(models[Path(file).stem])
            (root / "config" / file).write_text(yaml.safe_dump(given))

    def run(self):
        """Each step, and how it ended, up to the first that failed."""
        ended = {}
        for job in steps():
            (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
            assert "command" not in container  # The image's: cwpo.
            words = map(self._placed, container["args"])
            more = map(str, self.more.get(job["name"], ()))
            done = subprocess.run(
                [sys.executable, "-m", "cwpo", *words, *more],
                env=os.environ | {"CWPO_URL": self.url, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                check=False,
                text=True,
            )
            ended[job["name"]] = done
            if done.returncode:
                break
        return ended

    def _placed(self, text):
        for inside, outside in self.places.items():
            text = text.replace(f"{inside}/", f"{outside}/")
        return text


@pytest.fixture
def pipeline(tmp_path, tiny_causal, tiny_annotator):
    first = tmp_path / "first-annotator"
    shutil.copytree(tiny_annotator, first)
    up = Up(tmp_path / "up", "--annotator", str(first), "--workers", "1")
    models = {"annotator": tiny_causal, "sft": tiny_causal, "evaluation": tiny_annotator}
    yield Pipeline(tmp_path, models, up.url)
    up.process.terminate()
    up.process.wait()


@pytest.mark.slow
def test_the_pipeline_goes_from_labels_to_an_evaluated_policy(pipeline):
    written(pipeline.data / "labelled.jsonl", labelled(400, right=1))
    written(pipeline.data / "triplets.jsonl", triplets(40))
    ended = pipeline.run()
    assert [*ended] == [job["name"] for job in steps()], ended.popitem()[1].stderr
    assert all(done.returncode == 0 for done in ended.values()), ended.popitem()[1].stderr
    weighted = pq.read_table(pipeline.data / "weighted.parquet")
    assert weighted.num_rows == 40
    assert sum(weighted["certified"].to_pylist()) > 20
    with Client(pipeline.url) as client:
        assert client.model().name == "annotator"
        assert json.loads(weighted.schema.metadata[b"cwpo.annotator"])["revision"] == (
            client.model().revision
        )
    assert (pipeline.data / "evaluation" / "report.html").is_file()


@pytest.mark.slow
def test_without_a_certificate_nothing_is_labelled(pipeline):
    written(pipeline.data / "labelled.jsonl", labelled(200, right=0.5))
    written(pipeline.data / "triplets.jsonl", triplets(40))
    ended = pipeline.run()
    assert [*ended] == ["annotator", "certificate"]
    assert "no certificate" in ended["certificate"].stderr
    assert not (pipeline.data / "weighted.parquet").exists()
    with Client(pipeline.url) as client:
        assert client.model().name == "first-annotator"
