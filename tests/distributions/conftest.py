from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the wheels of the five parts, each built from its source distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in sorted(ROOT.glob("*/pyproject.toml")):
        build = [sys.executable, "-m", "uv", "build", "--quiet", "--no-build-isolation"]
        build += ["--python", sys.executable, "--out-dir", str(folder), str(project.parent)]
        subprocess.run(build, check=True, timeout=300)
    return folder
