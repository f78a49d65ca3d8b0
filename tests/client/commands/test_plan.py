"""`cwpo plan annotate`."""

from __future__ import annotations

import json

import pytest

from cwpo import cli
from cwpo.commands.plan import Plan

JOB = ("annotate", "--rows", "1e9", "--tokens", "400", "--gpus", "8")


def test_the_plan_names_gpus_workers_store_and_cost(capsys):
    cli.run(Plan, [*JOB, "--gpu", "h100", "--gpu-hour", "2.5"], "cwpo plan")
    out = capsys.readouterr().out
    for said in ("10,363", "26.8 hours", "214.4", "3,906,250", "TB", "0.54 a million triplets"):
        assert said in out
    assert "scaled" not in out


def test_a_scaled_rate_is_said_to_be_one(capsys):
    cli.run(Plan, [*JOB, "--gpu", "a100"], "cwpo plan")
    out = capsys.readouterr().out
    assert "scaled to a100" in out
    assert "cost" not in out


def test_programs_get_the_figures(capsys):
    cli.run(Plan, [*JOB, "--json"], "cwpo plan")
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 1e9
    assert found["hours"] == pytest.approx(26.8, abs=0.1)
    assert found["cost"] is None
