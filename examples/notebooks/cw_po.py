"""CW-PO in one notebook: labels, annotator, service, weighted dataset, CW-DPO, report.

marimo edit examples/notebooks/cw_po.py             # in the browser
python examples/notebooks/cw_po.py -- --steps 2  # as a script
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Confidence-weighted preference optimisation")


@app.cell
def _():
    import shutil
    import subprocess
    import sys
    from collections import Counter
    from pathlib import Path

    import marimo as mo
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from cwpo import Annotation, Client
    from cwpo.process import free_port
    from cwpo.trl import to_trl
    from cwpo_trainer import ConfidenceDPOConfig, ConfidenceDPOTrainer

    return (
        Annotation,
        AutoTokenizer,
        Client,
        ConfidenceDPOConfig,
        ConfidenceDPOTrainer,
        Counter,
        Dataset,
        LoraConfig,
        Path,
        free_port,
        mo,
        shutil,
        subprocess,
        sys,
        to_trl,
        torch,
    )


@app.cell
def _(mo):
    mo.md(r"""
    # Confidence-weighted preference optimisation

    A few people's labels train a *weak* annotator. It labels all other pairs, each with a
    confidence $c = \tanh(|\Delta| / 2)$ from the difference $\Delta$ of its scores. A *strong*
    model is then aligned on them, the loss of each pair multiplied by $c$.

    Everything here runs on a laptop: the models have 22 and 135 million parameters. Change the
    paths below for your own labels and models.
    """)
    return


@app.cell
def _(Path, mo, subprocess, sys):
    arguments = mo.cli_args()
    labels = Path(arguments.get("labels") or "examples/data/preferences.jsonl")
    run = Path(arguments.get("run") or "runs/notebook")
    steps = int(arguments.get("steps") or 10)
    # Ids of the Hub do as well. Two small models came with the packages of `make setup`.
    weak = arguments.get("weak") or "models/minilm"
    strong = arguments.get("strong") or "models/smollm2"
    subprocess.run([sys.executable, "examples/models.py", "minilm", "smollm2"], check=True)
    run.mkdir(parents=True, exist_ok=True)
    return labels, run, steps, strong, weak


@app.cell
def _(Dataset, labels, mo):
    pairs = Dataset.from_json(str(labels))
    mo.md(f"""
    ## 1. Labels

    {len(pairs):,} pairs that people have compared. The first of them:

    > **{pairs[0]["prompt"]}**
    >
    > a: {pairs[0]["response_a"]}
    >
    > b: {pairs[0]["response_b"]}
    >
    > preferred: **{pairs[0]["preferred"]}**
    """)
    return


@app.cell
def _(labels, mo, run, shutil, steps, subprocess, sys, weak):
    shutil.rmtree(run / "annotator", ignore_errors=True)
    # Three tenths of the labels are used; the rest plays the part of the millions without a label.
    subprocess.run(
        [
            *(sys.executable, "-m", "cwpo", "train-annotator"),
            *("--model", weak, "--data", labels, "--output", run / "annotator"),
            *("--splits", run / "splits", "--labelled-fraction", "0.3"),
            *("--held-out-fraction", "0.15", "--validation-fraction", "0"),
            *("--max-steps", str(7 * steps), "--batch-size", "8", "--learning-rate", "1e-4"),
        ],
        check=True,
    )
    annotator = run / "annotator"
    unlabelled = run / "splits" / "unlabelled.jsonl"
    mo.md("## 2. The annotator\n\nTrained by `cwpo train-annotator`, a Bradley-Terry model.")
    return annotator, unlabelled


@app.cell
def _(Client, Dataset, annotator, free_port, mo, run, subprocess, sys, to_trl, unlabelled):
    # Valkey, the service and a worker, under one supervisor.
    port = free_port()
    service = subprocess.Popen(
        [
            *(sys.executable, "-m", "cwpo", "up", "--annotator", annotator),
            *("--port", str(port), "--data-dir", run / "state"),
        ]
    )
    triplets = Dataset.from_json(str(unlabelled))
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            # Sent again until the annotator is loaded.
            model = client.with_options(max_retries=30).model()
            answer = client.annotate(triplets, truncation="prompt_left", progress=True)
    finally:
        service.terminate()
        service.wait()
    weighted = to_trl(triplets, answer)
    weighted.to_parquet(run / "weighted.parquet")
    mo.md(f"""
    ## 3. The weighted dataset

    {len(weighted):,} pairs, labelled by the service, which hosts {model.name} {model.revision}.
    """)
    return answer, weighted


@app.cell
def _(Annotation, Counter, answer, mo):
    confidences = [each.confidence for each in answer.annotations if isinstance(each, Annotation)]
    tenths = Counter(min(int(10 * confidence), 9) for confidence in confidences)
    counts = [tenths[tenth] for tenth in range(10)]
    bars = "\n".join(
        f"{tenth / 10:.1f}  {'█' * round(40 * count / max(counts))} {count}"
        for tenth, count in enumerate(counts)
    )
    mo.md(f"Confidence, and the number of pairs:\n\n```\n{bars}\n```")
    return


@app.cell
def _(
    AutoTokenizer,
    ConfidenceDPOConfig,
    ConfidenceDPOTrainer,
    LoraConfig,
    mo,
    run,
    steps,
    strong,
    torch,
    weighted,
):
    # TRL's DPOTrainer, with a weight for each pair.
    trainer = ConfidenceDPOTrainer(
        model=str(strong),
        args=ConfidenceDPOConfig(
            output_dir=str(run / "cw-dpo"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            max_length=512,
            logging_steps=1,
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=weighted,
        processing_class=AutoTokenizer.from_pretrained(strong),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    policy = run / "cw-dpo"
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    mo.md(f"""
    ## 4. CW-DPO

    {len(losses)} steps of 4 pairs, a LoRA adapter. The loss went from {losses[0]:.3f} to
    {losses[-1]:.3f}; a pair without confidence would not have moved the model at all.
    """)
    return (policy,)


@app.cell
def _(annotator, mo, policy, run, shutil, steps, strong, subprocess, sys):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    # The only reward model at hand is the annotator, which labelled the pairs: see what it says.
    subprocess.run(
        [
            *(sys.executable, "-m", "cwpo", "evaluate", "policy", policy, "--reference", strong),
            *("--judge", annotator, "--allow-annotator-as-judge"),
            *("--data", run / "splits" / "held_out.jsonl", "--output", run / "evaluation"),
            *("--prompts", str(min(16, 2 * steps)), "--max-new-tokens", "64", "--batch-size", "8"),
        ],
        check=True,
    )
    subprocess.run([sys.executable, "-m", "cwpo", "report", run], check=True)
    mo.md(f"## 5. The report\n\n[{run}/report.html]({run}/report.html)")
    return


if __name__ == "__main__":
    app.run()
