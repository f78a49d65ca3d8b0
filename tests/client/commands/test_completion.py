"""What the shells complete, in real shells: fish and zsh where they are installed."""

import os
import shutil
import subprocess
import sys

import pytest

from cwpo.cli import run
from cwpo.commands.completion import Completion

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """`script("bash")`: the file that the command prints for a shell."""
    folder = tmp_path_factory.mktemp("completion")

    def written(shell):
        path = folder / f"cwpo.{shell}"
        if not path.exists():
            command = [sys.executable, "-m", "cwpo", "completion", shell]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            path.write_text(result.stdout)
        return path

    return written


def in_shell(shell, code, cwd=None):
    """Its standard output, in lines."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    flags = {"bash": ["--norc", "--noprofile"], "fish": ["--no-config"], "zsh": ["-f"]}[shell]
    result = subprocess.run(
        [program, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "TERM": "dumb"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


BASH = """
source {script}
line={line!r}
COMP_LINE=$line COMP_POINT=${{#line}}
read -ra COMP_WORDS <<< "$line"
[[ $line == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
function=$(complete -p cwpo | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function cwpo "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(params=["bash", "fish"])
def completed(request, script, tmp_path):
    """`completed("cwpo jo")`: what stands there after Tab, without descriptions."""
    shell = request.param

    def complete(line):
        if shell == "bash":
            code = BASH.format(script=script("bash"), line=line)
        else:
            code = f"source {script('fish')}; complete -C {line!r}"
        found = in_shell(shell, code, tmp_path)
        return {candidate.split("\t")[0].strip() for candidate in found if candidate}

    return complete


def test_commands_and_subcommands_are_completed(completed):
    assert completed("cwpo an") == {"annotate"}
    assert {"jobs", "serve", "worker", "align", "quantize"} <= completed("cwpo ")
    assert {"submit", "list", "download"} <= completed("cwpo jobs ")
    assert completed("cwpo jobs w") == {"watch"}


def test_flags_and_their_values_are_completed(completed):
    assert completed("cwpo jobs list --li") == {"--limit"}
    assert {"--state", "--cursor", "--json", "--url"} <= completed("cwpo jobs list --")
    assert {"failed", "running", "completed"} <= completed("cwpo jobs list --state ")
    assert completed("cwpo annotate --truncation pr") == {"prompt_left"}


def test_paths_are_completed(completed, tmp_path):
    (tmp_path / "triplets.jsonl").write_text("")
    assert completed("cwpo annotate trip") == {"triplets.jsonl"}
    assert completed("cwpo align --data trip") == {"triplets.jsonl"}


def test_zsh_reads_the_script(script, tmp_path):
    assert in_shell("zsh", f"zsh -n {script('zsh')} && echo fine") == ["fine"]
    text = script("zsh").read_text()
    assert text.startswith("#compdef cwpo")
    for word in ("annotate", "--truncation", "prompt_left", "--cursor"):
        assert word in text


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as ending:
        run(Completion, ["tcsh"], "cwpo completion")
    assert "bash" in f"{ending.value.code}{capsys.readouterr().err}"
