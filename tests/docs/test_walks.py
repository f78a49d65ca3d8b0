"""What the docs tell to type runs: Python and shell, against a service with a worker.

Models are tiny ones in the place of those that the docs name.
"""

from __future__ import annotations

import asyncio
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from cwpo import Annotation, AsyncClient, Client, Triplet
from cwpo.errors import UnauthorizedError
from cwpo_annotator import Annotator
from harness import House, furnished, serving

from ..trainer.samples import pairs, weighted

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs"
FENCED = re.compile(r"(?ms)^```(\w+)\n(.*?)^```")


def blocks(page: str, language: str, having: str = "") -> list[str]:
    """The blocks of a language that have this text."""
    found = FENCED.findall((DOCS / page).read_text())
    return [text for of, text in found if of == language and having in text]


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{at}",
            "prompt": f"What is {at} and {at + 1}?",
            "response_a": f"It is {2 * at + 1}.",
            "response_b": "Who knows? " * (1 + at % 3),
            **more,
        }
        for at in range(count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def house(tiny_annotator, tmp_path_factory) -> Iterator[House]:
    """A service and a worker, of an annotator that is a folder, too."""
    with furnished(
        tmp_path_factory.mktemp("house"), partial(Annotator.load, tiny_annotator, dtype="float32")
    ) as house:
        house.start_worker()
        yield house


@pytest.fixture
def place(house, tiny_annotator, tmp_path, monkeypatch) -> Path:
    """A folder with the files that the docs name; the service is the one of CWPO_URL."""
    write(tmp_path / "triplets.jsonl", rows(20))
    write(tmp_path / "triplets" / "one.jsonl", rows(8))
    write(tmp_path / "triplets" / "two.jsonl", rows(9))
    subprocess.run(["gzip", "-k", tmp_path / "triplets.jsonl"], check=True)
    named = [
        {"question": row["prompt"], "answer_1": row["response_a"], "answer_2": row["response_b"]}
        for row in rows(6)
    ]
    write(tmp_path / "pairs.jsonl", named)
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        sheet = csv.DictWriter(file, named[0])
        sheet.writeheader()
        sheet.writerows(named)
    samples = [{"prompt": row["prompt"], "responses": ["Yes.", "No.", "So?"]} for row in rows(4)]
    write(tmp_path / "samples.jsonl", samples)
    write(tmp_path / "labelled.jsonl", rows(60, preferred="a"))
    write(
        tmp_path / "held_out.jsonl",
        [row | {"prompt": f"And {row['prompt']}"} for row in rows(60, preferred="b")],
    )
    write(
        tmp_path / "unlabelled.jsonl",
        [row | {"prompt": f"But {row['prompt']}"} for row in rows(40)],
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "annotator").symlink_to(tiny_annotator)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CWPO_URL", house.url)
    return tmp_path


def shell(script: str, **instead: str) -> str:
    """What a block prints, with other words in the place of some."""
    for word, other in instead.items():
        assert word in script
        script = script.replace(word, other)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def python(block: str, names: dict[str, Any], page: str) -> None:
    """Run a block; one that awaits is the body of a coroutine."""
    if re.search(r"(?m)^(async|await) ", block):
        body = "async def block():\n" + textwrap.indent(block, "    ")
        exec(compile(body, page, "exec"), names)
        asyncio.run(names["block"]())
    else:
        exec(compile(block, page, "exec"), names)


def test_the_page_on_python_runs_from_top_to_bottom(house, place, capsys):
    first, *others = blocks("python.md", "python")
    names: dict[str, Any] = {}
    python(first.replace("http://127.0.0.1:8000", house.url), names, "python.md")
    preferred, confidence = capsys.readouterr().out.split()
    assert preferred in ("a", "b", "tie")
    assert 0 <= float(confidence) < 1
    names |= {"rows": rows(5), "rows_of_some_source": partial(rows, 5)}
    names |= {"client": Client(house.url), "async_client": AsyncClient(house.url)}
    for block in others:
        python(block, names, "python.md")
    assert len(names["answer"].annotations) == 6
    assert names["job"].job.progress.rows_done == 17
    assert pq.read_table("weighted.parquet").num_rows == 17
    assert Path("errors.jsonl").read_text() == ""
    names["client"].close()


def test_jobs_are_submitted_and_read_as_their_page_says(house, place):
    submitted, read = blocks("jobs.md", "python")
    with Client(house.url) as client:
        python(submitted, {"client": client}, "jobs.md")
    assert pq.read_table("weighted.parquet").num_rows == 20
    whole, parts, ranked, urgent, _ = blocks("jobs.md", "sh")
    shell(whole)
    with Client(house.url) as client:
        job_id = client.jobs.list().jobs[0].id
    shell(parts.partition("\n")[0], JOB_ID=job_id)
    for line in read.splitlines():
        library = importlib.import_module(line.partition(".")[0])
        found = eval(line, {library.__name__: library})
        if hasattr(found, "collect"):
            found = found.collect()
        assert 20 in (getattr(found, "height", 0), *getattr(found, "shape", ()), _rows(found))
    shell(ranked)
    assert pq.read_table("weighted.parquet").num_rows == 4
    shell(urgent)


def _rows(found: Any) -> int:
    if isinstance(found, dict):
        return sum(len(part) for part in found.values())
    return len(found)


def test_embeddings_and_rankings_are_read_as_the_page_on_the_service_says(house, place):
    embedding, ranking = blocks("service.md", "python")
    names: dict[str, Any] = {}
    python(embedding, names, "service.md")
    (embedded,) = names["answer"].embeddings
    assert len(embedded.embedding) > 4
    python(ranking.replace("[...]", '["Water it.", "No idea.", "Light."]'), names, "service.md")
    (ranking,) = names["answer"].rankings
    assert sorted(ranking.order) == [0, 1, 2]
    assert len(ranking.confidence) == 2


def test_files_with_other_names_are_annotated_as_their_page_says(place):
    shell(blocks("files.md", "sh")[0])
    assert pq.read_table("weighted.parquet").num_rows == 6


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
def test_programs_follow_jobs_as_the_page_on_commands_says(place):
    _, _, followed, listed = blocks("command.md", "sh")
    assert shell(followed).split() == ["20"]
    assert shell(listed) == ""


def test_people_review_and_the_annotator_learns_as_the_pages_say(place, tiny_causal):
    shell("cwpo annotate unlabelled.jsonl -o weighted.parquet")
    exported, imported, trained = blocks("page.md", "sh")[0].splitlines()
    shell(exported.replace("--below 0.1", "--below 1"))
    tasks = json.loads(Path("pairs.json").read_text())
    assert tasks
    for task in tasks:
        answer = {"from_name": "preferred", "to_name": "prompt", "type": "choices"}
        task["annotations"] = [
            {"completed_by": 1, "result": [answer | {"value": {"choices": ["a"]}}]}
        ]
    Path("answers.json").write_text(json.dumps(tasks))
    shell(imported)
    assert len(Path("more.jsonl").read_text().splitlines()) == 60 + len(tasks)
    shell(trained.replace("MODEL", f"{tiny_causal} --epochs 1 --threads 1"))
    assert Path("runs/annotator-2/annotator.json").is_file()


def test_labels_to_come_are_suggested_and_imported_as_the_page_says(place):
    (block,) = blocks("evaluation.md", "sh", having="--suggest")
    suggested, imported = block.replace("\\\n", " ").splitlines()
    shell(suggested)
    with Path("runs/accuracy/to_label.csv").open(newline="") as file:
        answers = [*csv.DictReader(file)]
    assert len(answers) == 40
    with Path("runs/accuracy/to_label.csv").open("w", newline="") as file:
        sheet = csv.DictWriter(file, answers[0])
        sheet.writeheader()
        sheet.writerows(row | {"preferred": "b", "reviewer": "kim"} for row in answers)
    shell(imported)
    assert len(Path("more.jsonl").read_text().splitlines()) == 100
    shell("cwpo report runs/accuracy -o page.html")
    assert json.loads(Path("page.json").read_text())["annotators"]


def test_labels_are_prepared_as_the_page_says(place):
    shell("cwpo annotate triplets.jsonl -o weighted.parquet")
    write(place / "harmless.jsonl", rows(60, preferred="a"))
    write(place / "helpful.jsonl", rows(20, preferred="b"))
    (block,) = blocks("training-annotators.md", "sh", having="data poison")
    shell(block)
    for name, count in (("poisoned", 60), ("drawn", 20)):
        assert pq.read_table(f"{name}.parquet").num_rows == count
    assert pq.read_table("mixed.parquet").num_rows > 60


@pytest.fixture
def models(tiny_causal, tiny_tokenizer, tmp_path, monkeypatch) -> Path:
    """A folder of models by the names that the docs give them; a folder goes before the Hub."""
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "models/minilm", "models/smollm2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_causal)
    # Another one than any that is trained here.
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_causal, num_labels=1)
    for name in ("models/reward-model", "Skywork/Skywork-Reward-V2-Llama-3.1-8B"):
        judge.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def walk(script: str) -> None:
    """Run a script in which `cwpo up` starts the service that the commands after it use."""
    before, start, after = re.split(r"(?m)^(cwpo up .*&.*)$", script)
    shell(before)
    annotator = shlex.split(start.partition("&")[0])[-1]
    with serving(partial(Annotator.load, annotator, dtype="float32")) as service:
        shell(f"export CWPO_URL={service.url}\n{after}")


def test_the_steps_of_the_readme_lead_from_labels_to_a_report(models):
    write(models / "pairs.jsonl", pairs(60))
    write(models / "triplets.jsonl", pairs(30, seed=1))
    write(models / "held_out.jsonl", pairs(8, seed=2))
    (block,) = blocks("../README.md", "sh", having="cwpo train-annotator")
    walk(block.replace(". .venv/bin/activate\n", ""))
    figures = json.loads((models / "runs" / "report.json").read_text())
    assert {row["policy"] for row in figures["policies"]} == {"cw-dpo", "reference"}
    assert {row["run"] for row in figures["annotators"]} == {"annotator", "accuracy"}


def test_the_steps_of_the_page_on_training_lead_to_an_evaluated_policy(models):
    write(models / "pairs.jsonl", pairs(80))
    (block,) = blocks("training.md", "sh", having="# labels -> annotator")
    walk(block)
    assert (models / "runs" / "evaluation" / "report.html").is_file()


SHORT = "lora: true\nbatch_size: 2\nmax_steps: 2\nwarmup_steps: 0\ndtype: float32\n"


@pytest.fixture
def folders(models) -> Path:
    """What the steps before leave: an SFT model, a weighted dataset, held-out pairs, settings."""
    (models / "runs" / "demo").mkdir(parents=True)
    for start in ("sft", "demo/sft"):
        (models / "runs" / start).symlink_to(models / "models" / "smollm2")
    write(models / "weighted.jsonl", weighted(16))
    write(models / "held_out.jsonl", pairs(8, seed=2))
    places = "model: runs/sft\ndata: weighted.jsonl\noutput: runs/aligned\n"
    (models / "align.yaml").write_text(SHORT + places)
    return models


def test_adapters_settings_and_plans_are_as_the_page_on_training_says(folders):
    (folders / "runs" / "sft").unlink()
    (adapters,) = blocks("training.md", "sh", having="--adapter-only --output")
    shell(
        adapters.replace("weighted.parquet", "weighted.jsonl").replace(
            "--adapter-only", "--adapter-only --max-steps 1 --dtype float32"
        )
    )
    assert (folders / "runs" / "cw-dpo" / "adapter_config.json").is_file()
    assert (folders / "runs" / "evaluation" / "report.html").is_file()
    (set_,) = blocks("training.md", "sh", having="--set adam_beta2")
    shell(set_)
    run = json.loads((folders / "runs" / "aligned" / "run.json").read_text())
    assert run["settings"]["set"]["adam_beta2"] == 0.95
    (plan,) = blocks("training.md", "sh", having="align.yaml --dry-run")
    assert "steps" in shell(plan)


def test_a_second_run_reads_the_references_as_the_page_on_training_says(folders):
    (block,) = blocks("training.md", "sh", having="--reference-cache runs/cache")
    block = block.replace("weighted.parquet", "weighted.jsonl")
    write(folders / "runs" / "demo" / "weighted.jsonl", weighted(16))
    shell(block)
    kept = sorted((folders / "runs" / "cache").rglob("*"))
    shell(block.replace("runs/first", "runs/second"))
    assert kept == sorted((folders / "runs" / "cache").rglob("*"))
    first, second = (folders / "runs" / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_policy_is_aligned_online_as_the_page_on_training_says(folders, tiny_annotator):
    (folders / "runs" / "annotator").symlink_to(tiny_annotator)
    write(folders / "prompts.jsonl", [{"prompt": f"What is {at}?"} for at in range(8)])
    (block,) = blocks("training.md", "sh", having="--update immediate")
    few = " --max-new-tokens 8"
    walk(
        block.replace("-o runs/rounds", "-o runs/rounds" + few).replace(
            "-o runs/online", "-o runs/online" + few
        )
    )
    for policy in ("rounds/round-3/policy", "online"):
        assert (folders / "runs" / policy / "model.safetensors").is_file()


def test_processes_train_together_as_the_page_on_clusters_says(folders):
    """Without sharding, which needs GPUs."""
    command = blocks("cluster.md", "sh")[0].splitlines()[0]
    shell(re.sub(r"(--nproc-per-node|--world-size) \d", r"\1 2", command))
    run = json.loads((folders / "runs" / "aligned" / "run.json").read_text())
    assert run["settings"]["world_size"] == 2


def test_the_recipes_lead_from_labels_to_a_policy_as_their_page_says(models):
    """With few steps, an optimiser that CPUs have, and a file in the place of the Hub's data."""
    (models / "trainer").symlink_to(DOCS.parent / "trainer")
    write(models / "pairs.jsonl", pairs(80))
    block = blocks("../trainer/recipes/README.md", "sh")[0]
    annotator, *others = block.splitlines()
    short = "--optimizer adamw --max-steps 1 --batch-size 2 --gradient-accumulation 1"
    lines = [f"{annotator} --data pairs.jsonl --epochs 1", *others]
    walk("\n".join(f"{line} {short}" if "/qwen2.5-7b/" in line else line for line in lines))
    assert (models / "runs" / "qwen2.5-7b" / "cw-dpo" / "model.safetensors").is_file()
    (converted,) = blocks("../trainer/recipes/README.md", "sh", having="save_pretrained")
    shell(converted.replace("facebook/opt-1.3b", "Qwen/Qwen2.5-7B"))
    assert (models / "models" / "opt-1.3b" / "model.safetensors").is_file()


def test_certified_labels_are_trained_on_as_the_page_says(models, tiny_annotator):
    shutil.copytree(tiny_annotator, "runs/annotator")
    triplets = [Triplet.model_validate(row) for row in unlabelled(pairs(300, seed=3))]
    labels = Annotator.load("runs/annotator", dtype="float32").annotate(triplets)
    people = [
        triplet.model_dump() | {"preferred": label.preferred}
        for triplet, label in zip(triplets, labels, strict=True)
        if isinstance(label, Annotation)
    ]
    write(models / "held_out.jsonl", people)
    write(models / "triplets.jsonl", unlabelled(pairs(40, seed=4)))
    (certified,) = blocks("evaluation.md", "sh", having="--certify")
    (used,) = blocks("evaluation.md", "sh", having="--weight certified")
    walk(f"{certified}cwpo up --annotator runs/annotator &\n{used}")
    assert pq.read_table("weighted.parquet")["certified"].to_pylist().count(True) > 20
    assert (models / "runs" / "certified" / "run.json").is_file()


def unlabelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name != "preferred"} for row in rows]


def test_keys_are_made_as_the_pages_on_deployment_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deploy").mkdir()
    (single,) = blocks("deployment.md", "sh", having='echo "alice')
    (again,) = blocks("runbook.md", "sh", having="openssl")
    (composed,) = blocks("deployment.md", "sh", having="cat > deploy/.env")
    composed = composed.partition("docker compose")[0]
    tell = 'printf "%s\\n" '
    keys = [
        shell(f'{single}{tell}"$key"').split()[-1],
        shell(f'{again.replace("alice", "bob").rstrip()} >> keys\n{tell}"$key"').split()[-1],
        *shell(f'{composed}cat deploy/keys >> keys\n{tell}"$worker_key" "$my_key"').split(),
    ]
    told = dict(line.split("=", 1) for line in Path("deploy/.env").read_text().splitlines())
    assert told["CWPO_WORKER_API_KEY"] == keys[2]
    triplet = Triplet(prompt="p", response_a="a", response_b="b")
    with serving(api_keys_file=tmp_path / "keys") as service:
        for key in keys:
            assert Client(service.url, key).annotate([triplet]).annotations
        with pytest.raises(UnauthorizedError):
            Client(service.url, "another").annotate([triplet])


def test_the_command_is_checked_and_completed_as_its_page_says(place, house, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    house.reconcile()
    checked, completed, *_ = blocks("command.md", "sh")
    here = f"{checked.splitlines()[0]} --url {house.url} --redis-url {house.valkey.url}"
    assert "cwpo" in shell(f"{here} --store-url {house.store_url}")
    for folder in (
        ".local/share/bash-completion/completions",
        ".zfunc",
        ".config/fish/completions",
    ):
        (place / folder).mkdir(parents=True)
    shell(completed)
    assert "cwpo" in (place / ".zfunc" / "_cwpo").read_text()


def test_what_needs_no_model_prints_what_its_page_says(place, monkeypatch):
    monkeypatch.delenv("CWPO_DATA_DIR", raising=False)
    (block,) = blocks("evidence.md", "sh", having="reproduce --list")
    assert "contest" in shell(block.splitlines()[0])
    results = DOCS.parent / "benchmarks" / "results" / "reproduction"
    titles = ("Labels of the most confident pairs", "Uses of the confidence")
    for shown, title in zip(blocks("evidence.md", "sh", having="--show"), titles, strict=True):
        assert title in shell(shown.replace("benchmarks/results/reproduction", str(results)))
    (block,) = blocks("capacity.md", "sh", having="cwpo plan")
    assert "triplets" in shell(block)
