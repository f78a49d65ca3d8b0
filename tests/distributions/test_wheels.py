"""Each part's wheel, installed without the source tree, is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What each part needs of the others, lowest first.
SIBLINGS = {
    "cwpo": [],
    "cwpo_annotator": ["cwpo"],
    "cwpo_worker": ["cwpo"],
    "cwpo_service": ["cwpo", "cwpo_annotator", "cwpo_worker"],
    "cwpo_trainer": ["cwpo", "cwpo_annotator"],
}
COMMANDS = {
    "cwpo": {"annotate", "completion", "doctor", "jobs", "review"},
    "cwpo_annotator": {"quantize"},
    "cwpo_worker": {"worker"},
    "cwpo_service": {"serve", "up"},
    "cwpo_trainer": {
        *("train-annotator", "sft", "align", "online", "evaluate", "report", "push"),
    },
}
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
heavy = {"torch", "transformers", "fastapi"} & sys.modules.keys()
print(package.__file__, *sorted(heavy), sep="\\n")
"""


@pytest.fixture
def environment(tmp_path):
    """The folder of an empty environment, without pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    return tmp_path / "env"


def install(environment: Path, *arguments: str) -> None:
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet"]
    uv += ["--python", str(environment / "bin" / "python"), *arguments]
    subprocess.run(uv, check=True, timeout=300)


def run(environment: Path, program: str, *arguments: str) -> str:
    """Its output, away from the repository and from what this process was started with."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("part", ["cwpo", "cwpo_worker"])
def test_client_and_worker_install_from_wheels_without_torch(part, wheels, environment):
    """With their declared requirements alone, resolved into an empty environment."""
    name = part.replace("_", "-")
    constraints = str(ROOT / "locks" / "dev.txt")
    install(environment, "--find-links", str(wheels), "--constraint", constraints, name)
    file, *heavy = run(environment, "python", "-c", IMPORT_ALL, part).splitlines()
    assert Path(file).is_relative_to(environment)
    assert not heavy
    assert not list(environment.glob("lib/*/site-packages/torch"))
    assert COMMANDS[part] <= commands(environment)


@pytest.mark.parametrize("part", SIBLINGS)
def test_a_wheel_carries_all_of_its_package(part, wheels, environment):
    """Beside the other packages of this environment, but not the source tree."""
    files = [next(wheels.glob(f"{name}-*.whl")) for name in [*SIBLINGS[part], part]]
    install(environment, "--no-deps", *map(str, files))
    site = next(environment.glob("lib/*/site-packages"))
    (site / "others.pth").write_text(f"{others(environment / 'others')}\n")
    file, *_ = run(environment, "python", "-c", IMPORT_ALL, part).splitlines()
    assert Path(file).is_relative_to(environment)
    installed = {str(path.relative_to(site)) for path in (site / part).rglob("*") if data(path)}
    (source,) = ROOT.glob(f"*/src/{part}")
    assert installed == {
        str(path.relative_to(source.parent)) for path in source.rglob("*") if data(path)
    }
    assert f"{part}/py.typed" in installed
    assert list(site.glob(f"{part}-*.dist-info/licenses/LICENSE"))
    assert COMMANDS[part] <= commands(environment)


def others(folder: Path) -> Path:
    """Fill a folder with links to the packages of this environment that are not the five parts."""
    folder.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith("cwpo"):
            (folder / package.name).symlink_to(package)
    return folder


def data(path: Path) -> bool:
    return path.is_file() and path.suffix != ".pyc"


def commands(environment: Path) -> set[str]:
    lines = run(environment, "cwpo", "--help").splitlines()
    return {line.split()[0] for line in lines if line.startswith("  ")}
