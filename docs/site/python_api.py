"""Writes the pages of the Python reference, which mkdocstrings fills from the docstrings.

It reads the code and imports none of it.
"""

from __future__ import annotations

FOLDER = "python"
ALONE = ("    options:", "      members: false", "      inherited_members: false")
# Each page: what it is about, and its names; a name that ends with `.` stands for itself alone.
PAGES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "cwpo": (
        "The client: sync, async, types and errors. [From Python](../docs/python.md) shows how "
        "they are used. `AsyncClient` has the methods of `Client`, as coroutines.",
        {
            "Clients": [
                "cwpo.Client",
                "cwpo.AsyncClient.",
                "cwpo.resources.jobs.Jobs",
                "cwpo.resources.jobs.SubmittedJob",
                "cwpo.resources.files.Files",
            ],
            "Types": [
                "cwpo.Triplet",
                "cwpo.Message",
                "cwpo.Annotation",
                "cwpo.FailedAnnotation",
                "cwpo.RankItem",
                "cwpo.Ranking",
                "cwpo.Job",
            ],
            "For TRL": ["cwpo.trl"],
            "Errors": ["cwpo.errors"],
        },
    ),
    "cwpo_annotator": (
        "The annotator in one process, without a service; [scoring](../docs/scoring.md) shows how "
        "it is used.",
        {
            "Annotator": ["cwpo_annotator.Annotator", "cwpo_annotator.CheckpointError"],
            "Labels and confidence": ["cwpo_annotator.confidence"],
        },
    ),
    "cwpo_trainer": (
        "The trainer in scripts that use TRL; [for users of TRL](../docs/trl.md) shows how it is "
        "used, and [the method](../docs/method.md) has the formulas.",
        {
            "Trainer": [
                "cwpo_trainer.ConfidenceDPOTrainer",
                "cwpo_trainer.ConfidenceDPOConfig",
            ],
            "Losses": ["cwpo_trainer.losses"],
            "Weights": ["cwpo_trainer.weights"],
        },
    ),
}


def pages() -> dict[str, str]:
    """A page for each distribution that one imports."""
    return {f"{FOLDER}/{name}.md": page(name, *PAGES[name]) for name in PAGES}


def page(title: str, about: str, sections: dict[str, list[str]]) -> str:
    """A page for mkdocstrings to fill."""
    parts = [f"# {title}", "", about, ""]
    for heading, names in sections.items():
        parts += [f"## {heading}", ""]
        for name in names:
            parts += [f"::: {name.removesuffix('.')}"]
            parts += (
                ["    options:", "      members: false", "      inherited_members: false"]
                if name.endswith(".")
                else []
            )
            parts += [""]
    return "\n".join(parts)
