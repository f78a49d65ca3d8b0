"""The paper's figures, against its own averages and what its text says of them."""

from __future__ import annotations

from statistics import mean

import pytest

from cwpo_trainer.reproduction import published

OPT, QWEN = published.OPT_13B, published.QWEN_14B
# The lines "Avg." of the paper, by block and in the order of its columns.
AVERAGES = [
    (published.TABLE_1, OPT, (58.4, 57.9, 60.3, 58.3, 57.9, 61.5, 56.3, 55.5, 62.7)),
    (published.TABLE_1, QWEN, (73.7, 74.8, 75.6, 74.6, 73.7, 77.2, 73.5, 74.6, 77.3)),
    (published.TABLE_3, published.OPT_1_3B, (66.4, 68.8)),
    (published.TABLE_3, published.QWEN_7B, (65.1, 70.6)),
    (published.TABLE_5, published.QWEN_7B, (72.7, 69.4, 68.4, 70.1)),
    (published.TABLE_10, published.OPT_1_3B, (70.03, 67.80, 67.27, 66.70, 65.67)),
    (published.TABLE_11, published.QWEN_7B, (66.87, 64.00, 61.03, 60.80, 60.43)),
    (published.TABLE_12, "Qwen2.5", (62.5, 63.9, 64.5, 65.7)),
    (published.TABLE_13, "OPT-125M", (60.4, 63.1, 64.8, 65.6, 64.9)),
    (published.TABLE_17, OPT, (53.13, 54.03, 56.33, 55.1, 49.03, 57.63, 52.77, 51.13, 58.5)),
    (published.TABLE_17, QWEN, (77.83, 80.67, 83.13, 81.37, 78.87, 83.57, 77.83, 82.0, 84.37)),
    (published.TABLE_20, OPT, (58.9, 57.4, 59.4, 57.7, 57.4, 61.4, 56.0, 56.4, 63.0)),
    (published.TABLE_20, QWEN, (73.5, 74.9, 76.1, 75.3, 73.4, 77.1, 73.9, 74.3, 77.0)),
    (published.TABLE_26, published.QWEN_7B, (66.15, 66.05, 66.90, 69.80)),
]


@pytest.mark.parametrize(("table", "block", "averages"), AVERAGES)
def test_the_averages_are_those_of_the_paper(table, block, averages):
    lines = [figures for line, figures in table.lines.items() if line[0] == block]
    found = [mean(column) for column in zip(*lines, strict=True)]
    # Rounded to one or two digits, from figures that were rounded before.
    assert found == pytest.approx(averages, abs=0.11)


def test_the_averages_of_both_blocks():
    def averages(table):
        return [mean(column) for column in zip(*table.lines.values(), strict=True)]

    assert averages(published.TABLE_4) == pytest.approx((68.5, 67.5, 72.3), abs=0.06)
    assert averages(published.TABLE_6) == pytest.approx((53.8, 54.9, 64.8), abs=0.06)
    assert averages(published.TABLE_16) == pytest.approx((65.0, 66.0, 68.2), abs=0.06)
    assert averages(published.TABLE_23) == pytest.approx((53.9, 55.8, 56.6), abs=0.06)


def test_table_2_by_data_and_family():
    def averages(data, weak):
        lines = [
            figures
            for line, figures in published.TABLE_2.lines.items()
            if line[0] == data and line[1].startswith(weak)
        ]
        assert len(lines) == 4
        return [mean(column) for column in zip(*lines, strict=True)]

    assert averages("HH-RLHF", "OPT") == pytest.approx((59.9, 61.2, 64.8), abs=0.06)
    assert averages("HH-RLHF", "Qwen") == pytest.approx((67.3, 68.1, 73.1), abs=0.06)
    assert averages("TL;DR", "OPT") == pytest.approx((55.2, 50.0, 58.2), abs=0.06)
    assert averages("TL;DR", "Qwen") == pytest.approx((58.1, 58.7, 63.4), abs=0.07)


def test_the_headline_numbers():
    # Over the 18 settings of Table 1: 65.8, 65.7 and 69.1.
    lines = published.TABLE_1.lines.values()
    for at, expected in enumerate((65.8, 65.7, 69.1)):
        assert mean(value for line in lines for value in line[at::3]) == pytest.approx(
            expected, abs=0.06
        )
    # CW-DPO with 30 % of the labels against DPO with all.
    assert published.TABLE_3.figure((published.OPT_1_3B, "Harmless"), "CW-DPO") == 72.9
    assert published.TABLE_6_TIME == (3319, 4978, 2450)
    assert [line[2] for line in published.TABLE_6.lines.values()][:3] == [69.1, 64.2, 63.8]


def test_tables_that_share_runs_agree():
    # Tables 10 and 11 at 30 %, and Table 4; Table 2's 13B and 14B, and Table 1's DPO.
    for line, figures in (published.TABLE_10.lines | published.TABLE_11.lines).items():
        assert figures[0] == published.TABLE_4.figure(line, "Top 30%")
    for block in (published.OPT_13B, published.QWEN_14B):
        for data in ("HH-RLHF", "TL;DR"):
            of_table_1 = published.TABLE_1.lines[block, data][:3]
            assert published.TABLE_2.lines[data, block] == of_table_1
    for line in published.TABLE_22.lines:
        assert published.TABLE_22.lines[line] == (
            published.TABLE_21.figure(line, "Online CW-DPO"),
            published.TABLE_1.figure(line, "DPO: CW-DPO"),
        )
    for name in ("HH-RLHF", "TL;DR"):
        line = (published.QWEN_7B, name)
        of_table_2 = published.TABLE_2.lines[name, published.QWEN_7B]
        assert (
            published.TABLE_26.lines[line][0],
            *published.TABLE_26.lines[line][1::2],
        ) == of_table_2


def test_every_spread_has_its_figure():
    table = published.TABLE_20
    assert table.spreads.keys() == table.lines.keys()
    assert all(len(table.spreads[line]) == len(table.lines[line]) == 9 for line in table.lines)
    assert table.figure((published.OPT_13B, "HH-RLHF"), "DPO: CW-DPO") == 60.79
    assert table.spread((published.OPT_13B, "HH-RLHF"), "DPO: CW-DPO") == 2.98
