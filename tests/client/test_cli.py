import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CWPO = Path(sys.executable).with_name("cwpo")


def cwpo(*arguments, **environment):
    return subprocess.run(
        [CWPO, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def commands():
    lines = cwpo("--help").stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith("  ")]


def test_the_overview_lists_the_commands_of_all_installed_distributions():
    assert {
        "annotate",
        "jobs",
        "serve",
        "up",
        "worker",
        "train-annotator",
        "sft",
        "align",
        "evaluate",
        "report",
        "push",
        "data",
        "reproduce",
    } <= set(commands())


@pytest.mark.slow
def test_every_command_shows_an_example_in_its_help():
    for name in commands():
        result = cwpo(name, "--help")
        assert result.returncode == 0, name
        assert f"cwpo {name}" in result.stdout.split("Example")[1], name


def test_the_overview_imports_no_torch():
    code = (
        "import sys; sys.argv = ['cwpo', '--help']\n"
        "from cwpo.cli import main; main()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["anotate"], "no command 'anotate'"),
        (["annotate", "nowhere.jsonl", "-o", "out.parquet"], "nowhere.jsonl: no such file"),
        (["annotate", "nowhere.jsonl", "-o", "out.csv"], "out.csv: an output is"),
        (["annotate", "nowhere.jsonl"], "--output is missing"),
        (["jobs", "list", "--url", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        (["jobs", "list", "--limit", "0"], "--limit"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, tmp_path):
    result = cwpo(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("--help", ""), ("--help", "1"), ("jobs list --help", "")]
)
def test_output_that_nobody_reads_ends_a_command_without_a_word(unread, command, unbuffered):
    result = unread(*command.split(), PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.slow
def test_flags_win_over_the_environment():
    result = cwpo("jobs", "list", "--url", "http://127.0.0.1:9", CWPO_URL="http://127.0.0.1:10")
    assert "127.0.0.1:9 " in result.stderr
    assert "127.0.0.1:10" in cwpo("jobs", "list", CWPO_URL="http://127.0.0.1:10").stderr


def test_a_config_file_gives_settings_and_unknown_keys_are_refused(tmp_path):
    config = tmp_path / "align.yaml"
    config.write_text("model: m\ndata: d.parquet\noutput: out\nlearning-rat: 1e-5\n")
    result = cwpo("align", "--config", str(config))
    assert result.returncode == 1
    assert "no setting is called learning_rat" in result.stderr


def align_with(tmp_path, **files):
    """`cwpo align` with the first of these files as its --config."""
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return cwpo("align", "--config", str(tmp_path / f"{next(iter(files))}.yaml"))


def test_a_config_file_adds_to_the_one_that_it_extends(tmp_path):
    needed = "model: m\ndata: no-such.parquet\noutput: out\n"
    base = "learning_rate: fast\nbeta: strong\n"
    result = align_with(tmp_path, own=f"extends: base.yaml\nbeta: 0.5\n{needed}", base=base)
    assert "--learning-rate" in result.stderr, result.stderr
    assert "--beta" not in result.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"own": "extends: base.yaml", "base": "learning-rat: 1"}, "no setting is called"),
        ({"own": "extends: base.yaml", "base": "extends: own.yaml"}, "extends itself"),
        ({"own": "extends: missing.yaml"}, "missing.yaml"),
        ({"own": "extends: [a.yaml, b.yaml]"}, "the path of one file"),
    ],
    ids=["unknown key", "circle", "missing", "two"],
)
def test_a_config_file_that_extends_wrongly_is_one_line(tmp_path, files, said):
    result = align_with(tmp_path, **files)
    assert result.returncode == 1
    assert said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["serve", "align", "train-annotator", "jobs list"])
def test_help_names_values_in_words_and_shows_no_default_of_nothing(command):
    told = cwpo(*command.split(), "--help").stdout
    assert "(default: None)" not in told
    assert "(default: )" not in told
    assert "(default: {})" not in told
    values = re.findall(r"--[\w-]+ (\w+)", told.partition("options:")[2])
    assert {"TEXT", "INT"} & set(values)
    assert not {"str", "int", "float", "Path", "list", "SecretStr", "datetime"} & set(values)


@pytest.mark.parametrize(
    ("command", "subcommand", "said"),
    [
        ("jobs", "watch", "Follow a job until it ends"),
        ("evaluate", "annotator", "Measure an annotator's agreement"),
    ],
)
def test_help_says_what_each_subcommand_does(command, subcommand, said):
    assert re.search(rf"\n +{subcommand} +{said}", cwpo(command, "--help").stdout)
