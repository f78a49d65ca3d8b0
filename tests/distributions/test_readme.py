"""The README's first five minutes, word for word, from the wheels.

No registry is asked: what the wheels require is that of this environment, found by PYTHONPATH. The
reward model is a tiny one in a folder of the same name, which goes before the Hub.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import TIMEOUT, House, url_in

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[2] / "README.md").read_text()
ROWS = [
    {"question": row["prompt"], "answer_1": row["response_a"], "answer_2": row["response_b"]}
    for row in House.rows(20)
]


def blocks(heading):
    """The commands of a section, block by block."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```(?:sh|python)\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def terminal(wheels, tiny_annotator, tmp_path):
    """`terminal("...")`: a shell in a folder with the wheels, a model and a file of one's own."""
    shutil.copytree(wheels, tmp_path / "dist", ignore=shutil.ignore_patterns("*.tar.gz", ".*"))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "answers.parquet")
    (model,) = re.findall(r"--annotator (\S+)", blocks("Five minutes: your own file")[0])
    shutil.copytree(tiny_annotator, tmp_path / model)
    others = tmp_path / "others"
    others.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        # With the five parts, nothing here would need their wheels.
        if not re.match(r"_*(editable_impl_)?cwpo|.*\.pth$", package.name):
            (others / package.name).symlink_to(package)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    python = Path(sys.executable).resolve().parent
    environment = clean | {
        "PATH": f"{python}:/usr/bin:/bin",
        "PYTHONPATH": str(others),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "CWPO_PORT": "0",
        "CWPO_DEVICE": "cpu",
    }

    def start(code, **more):
        return subprocess.Popen(
            ["bash", "-e", "-c", code],
            cwd=tmp_path,
            env=environment | more,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_a_file_of_ones_own_is_annotated_by_the_readme_alone(terminal, tmp_path):
    serve, annotate, read = blocks("Five minutes: your own file")
    first = terminal(serve)
    try:
        line = next(line for line in first.stdout if line.startswith("cwpo up: "))
        second = terminal(annotate, CWPO_URL=url_in(line))
        assert second.wait(TIMEOUT) == 0
        written = pq.read_table(tmp_path / "weighted.parquet").to_pylist()
        assert [row["prompt"] for row in written] == [row["question"] for row in ROWS]
        third = terminal(f". cwpo-env/bin/activate; python - <<'END'\n{read}END")
        shown = third.stdout.read().splitlines()
        assert shown == [f"{row['confidence']:.2f} {row['chosen']}" for row in written[:3]]
    finally:
        os.killpg(first.pid, signal.SIGINT)
        first.wait(TIMEOUT)
    program = (tmp_path / "cwpo-env" / "bin" / "cwpo").read_text()
    assert str(tmp_path) in program.splitlines()[0]
