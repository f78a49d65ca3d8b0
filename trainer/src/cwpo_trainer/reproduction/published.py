"""The figures that the paper (arXiv 2603.04968) prints, in the layout of its tables.

A table maps each line, (block, line), to its figures in the order of the columns, in per cent
unless it is said otherwise. Lines of averages are computed, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Line = tuple[str, str]


@dataclass(frozen=True)
class Table:
    """A table of the paper. spreads: what stands behind ±, in the places of the figures."""

    columns: tuple[str, ...]
    lines: Mapping[Line, tuple[float | None, ...]]
    spreads: Mapping[Line, tuple[float, ...]] | None = None

    def figure(self, line: Line, column: str) -> float | None:
        """The paper's figure; None where it prints none."""
        figures = self.lines.get(line)
        return None if figures is None else figures[self.columns.index(column)]

    def spread(self, line: Line, column: str) -> float | None:
        """What stands behind its ±; None where it prints none."""
        spreads = (self.spreads or {}).get(line)
        return None if spreads is None else spreads[self.columns.index(column)]


OPT_13B = "OPT-125M → OPT-13B"
QWEN_14B = "Qwen2.5-0.5B → Qwen2.5-14B"
OPT_1_3B = "OPT-125M → OPT-1.3B"
QWEN_7B = "Qwen2.5-0.5B → Qwen2.5-7B"

LABELLINGS = tuple(
    f"{loss}: {labels}"
    for loss in ("DPO", "IPO", "rDPO")
    for labels in ("Human", "WS-DPO", f"CW-{loss}")
)
THREE = ("Human", "WS-DPO", "CW-DPO")

TABLE_1 = Table(
    LABELLINGS,
    {
        (OPT_13B, "HH-RLHF"): (56.9, 56.7, 61.3, 58.2, 62.8, 63.5, 55.9, 57.6, 63.0),
        (OPT_13B, "TL;DR"): (57.0, 53.5, 56.6, 53.3, 49.7, 54.6, 54.2, 47.7, 61.4),
        (OPT_13B, "UFB"): (61.3, 63.4, 63.1, 63.4, 61.3, 66.4, 58.9, 61.2, 63.7),
        (QWEN_14B, "HH-RLHF"): (78.8, 81.4, 80.6, 83.4, 81.0, 86.8, 81.2, 82.2, 86.2),
        (QWEN_14B, "TL;DR"): (64.2, 64.8, 66.0, 61.8, 62.8, 64.2, 67.0, 66.4, 68.8),
        (QWEN_14B, "UFB"): (78.1, 78.3, 80.1, 78.5, 77.2, 80.7, 72.4, 75.1, 76.8),
    },
)
TABLE_2 = Table(
    THREE,
    {
        ("HH-RLHF", "OPT-125M → OPT-1.3B"): (71.5, 66.7, 69.9),
        ("HH-RLHF", "OPT-125M → OPT-2.7B"): (55.1, 58.5, 60.3),
        ("HH-RLHF", "OPT-125M → OPT-6.7B"): (56.1, 62.8, 67.6),
        ("HH-RLHF", "OPT-125M → OPT-13B"): (56.9, 56.7, 61.3),
        ("TL;DR", "OPT-125M → OPT-1.3B"): (53.7, 44.7, 59.5),
        ("TL;DR", "OPT-125M → OPT-2.7B"): (52.6, 51.6, 59.1),
        ("TL;DR", "OPT-125M → OPT-6.7B"): (57.5, 50.2, 57.7),
        ("TL;DR", "OPT-125M → OPT-13B"): (57.0, 53.5, 56.6),
        ("HH-RLHF", "Qwen2.5-0.5B → Qwen2.5-1.5B"): (53.4, 55.8, 63.3),
        ("HH-RLHF", "Qwen2.5-0.5B → Qwen2.5-3B"): (66.0, 63.3, 73.3),
        ("HH-RLHF", "Qwen2.5-0.5B → Qwen2.5-7B"): (71.1, 72.0, 75.2),
        ("HH-RLHF", "Qwen2.5-0.5B → Qwen2.5-14B"): (78.8, 81.4, 80.6),
        ("TL;DR", "Qwen2.5-0.5B → Qwen2.5-1.5B"): (51.8, 53.7, 60.3),
        ("TL;DR", "Qwen2.5-0.5B → Qwen2.5-3B"): (55.0, 56.1, 62.7),
        ("TL;DR", "Qwen2.5-0.5B → Qwen2.5-7B"): (61.2, 60.1, 64.4),
        ("TL;DR", "Qwen2.5-0.5B → Qwen2.5-14B"): (64.2, 64.8, 66.0),
    },
)
TABLE_3 = Table(
    ("Human (100%)", "CW-DPO"),
    {
        (OPT_1_3B, "Harmless"): (69.2, 72.9),
        (OPT_1_3B, "Helpful"): (70.2, 72.7),
        (OPT_1_3B, "HH-RLHF"): (71.9, 69.9),
        (OPT_1_3B, "TL;DR"): (54.2, 59.5),
        (QWEN_7B, "Harmless"): (65.7, 72.0),
        (QWEN_7B, "Helpful"): (58.5, 70.8),
        (QWEN_7B, "HH-RLHF"): (72.7, 75.2),
        (QWEN_7B, "TL;DR"): (63.4, 64.4),
    },
)
TABLE_4 = Table(
    ("Top 30%", "Top 40%", "CW-DPO"),
    {
        (OPT_1_3B, "Harmless"): (72.3, 70.5, 72.9),
        (OPT_1_3B, "Helpful"): (70.1, 66.3, 72.7),
        (OPT_1_3B, "HH-RLHF"): (67.7, 68.2, 69.9),
        (QWEN_7B, "Harmless"): (70.6, 69.1, 72.0),
        (QWEN_7B, "Helpful"): (58.7, 60.2, 70.8),
        (QWEN_7B, "HH-RLHF"): (71.3, 70.4, 75.2),
    },
)
# The text at hand lacks the formulas of the second to fourth weight.
TABLE_5 = Table(
    ("C", "second", "third", "fourth"),
    {
        (QWEN_7B, "Harmless"): (72.0, 70.3, 68.6, 69.1),
        (QWEN_7B, "Helpful"): (70.8, 67.8, 67.4, 68.7),
        (QWEN_7B, "HH-RLHF"): (75.2, 70.1, 69.2, 72.5),
    },
)
TABLE_6 = Table(
    ("DPO", "SFT+DPO", "BT"),
    {
        ("OPT-125M", "Harmless"): (55.2, 56.3, 69.1),
        ("OPT-125M", "Helpful"): (54.1, 55.4, 64.2),
        ("OPT-125M", "HH-RLHF"): (50.8, 52.1, 63.8),
        ("Qwen-0.5B", "Harmless"): (56.1, 57.1, 65.3),
        ("Qwen-0.5B", "Helpful"): (55.2, 56.0, 63.1),
        ("Qwen-0.5B", "HH-RLHF"): (51.4, 52.6, 63.2),
    },
)
# In seconds; the paper does not say of which model and data.
TABLE_6_TIME = (3319.0, 4978.0, 2450.0)
_TOP = ("30%", "50%", "75%", "100%", "Human")
TABLE_10 = Table(
    _TOP,
    {
        (OPT_1_3B, "Harmless"): (72.3, 67.9, 67.7, 67.4, 66.2),
        (OPT_1_3B, "Helpful"): (70.1, 68.0, 67.2, 66.8, 66.4),
        (OPT_1_3B, "HH-RLHF"): (67.7, 67.5, 66.9, 65.9, 64.4),
    },
)
TABLE_11 = Table(
    _TOP,
    {
        (QWEN_7B, "Harmless"): (70.6, 68.4, 66.7, 66.9, 65.1),
        (QWEN_7B, "Helpful"): (58.7, 55.2, 51.5, 52.3, 54.4),
        (QWEN_7B, "HH-RLHF"): (71.3, 68.4, 64.9, 63.2, 61.8),
    },
)
TABLE_12 = Table(
    ("0.5B", "1.5B", "3B", "7B"),
    {
        ("Qwen2.5", "Harmlessness"): (63.5, 65.9, 66.6, 67.1),
        ("Qwen2.5", "Helpfulness"): (63.2, 64.7, 65.3, 67.2),
        ("Qwen2.5", "TL;DR"): (60.7, 61.0, 61.6, 62.9),
    },
)
TABLE_13 = Table(
    ("10%", "20%", "30%", "40%", "50%"),
    {
        ("OPT-125M", "Harmlessness"): (62.6, 65.5, 67.2, 67.8, 67.1),
        ("OPT-125M", "Helpfulness"): (61.9, 63.4, 65.3, 66.4, 65.3),
        ("OPT-125M", "Both"): (56.7, 60.2, 61.9, 62.6, 62.2),
    },
)
TABLE_16 = Table(
    THREE,
    {
        ("OPT-125M → Qwen2.5-14B", "Harmless"): (67.3, 66.4, 72.2),
        ("OPT-125M → Qwen2.5-14B", "Helpful"): (54.1, 55.9, 57.2),
        ("OPT-125M → Qwen2.5-14B", "HH-RLHF"): (78.8, 77.7, 79.7),
        ("Qwen2.5-0.5B → OPT-13B", "Harmless"): (74.3, 72.4, 75.4),
        ("Qwen2.5-0.5B → OPT-13B", "Helpful"): (65.7, 75.4, 73.6),
        ("Qwen2.5-0.5B → OPT-13B", "HH-RLHF"): (56.9, 57.2, 62.5),
        ("Qwen2.5-0.5B → Llama-3.1-8B-Instruct", "Harmless"): (60.6, 61.9, 63.1),
        ("Qwen2.5-0.5B → Llama-3.1-8B-Instruct", "Helpful"): (61.3, 60.1, 63.8),
        ("Qwen2.5-0.5B → Llama-3.1-8B-Instruct", "HH-RLHF"): (65.7, 67.2, 66.2),
    },
)
TABLE_17 = Table(
    LABELLINGS,
    {
        (OPT_13B, "HH-RLHF"): (43.9, 44.6, 51.9, 43.7, 33.5, 45.8, 46.4, 42.1, 55.1),
        (OPT_13B, "TL;DR"): (55.7, 52.8, 52.8, 59.5, 53.4, 63.2, 56.6, 54.5, 61.0),
        (OPT_13B, "UFB"): (59.8, 64.7, 64.3, 62.1, 60.2, 63.9, 55.3, 56.8, 59.4),
        (QWEN_14B, "HH-RLHF"): (75.9, 80.7, 79.7, 86.7, 86.6, 89.5, 85.0, 85.8, 89.4),
        (QWEN_14B, "TL;DR"): (80.8, 81.8, 86.5, 80.3, 74.6, 84.6, 77.6, 85.9, 83.9),
        (QWEN_14B, "UFB"): (76.8, 79.5, 83.2, 77.1, 75.4, 76.6, 70.9, 74.3, 79.8),
    },
)
TABLE_20 = Table(
    LABELLINGS,
    {
        (OPT_13B, "HH-RLHF"): (56.88, 55.01, 60.79, 58.87, 61.79, 64.30, 55.92, 57.63, 62.95),
        (OPT_13B, "TL;DR"): (57.79, 53.45, 53.85, 51.54, 49.30, 54.80, 55.04, 48.14, 62.12),
        (OPT_13B, "UFB"): (62.12, 63.72, 63.61, 62.63, 60.96, 65.17, 57.11, 63.41, 63.95),
        (QWEN_14B, "HH-RLHF"): (79.77, 82.26, 81.50, 84.16, 81.88, 87.40, 82.07, 83.01, 86.64),
        (QWEN_14B, "TL;DR"): (63.69, 64.29, 65.67, 61.31, 62.10, 63.69, 66.47, 65.87, 68.45),
        (QWEN_14B, "UFB"): (77.10, 78.12, 81.05, 80.41, 76.15, 80.17, 73.12, 74.03, 75.96),
    },
    {
        (OPT_13B, "HH-RLHF"): (4.43, 3.58, 2.98, 3.18, 1.75, 2.24, 4.90, 3.59, 1.96),
        (OPT_13B, "TL;DR"): (3.47, 2.39, 5.33, 1.64, 2.14, 2.33, 0.28, 3.97, 4.80),
        (OPT_13B, "UFB"): (2.18, 2.93, 3.17, 1.07, 1.15, 2.32, 2.18, 2.35, 2.33),
        (QWEN_14B, "HH-RLHF"): (1.39, 1.93, 4.40, 3.37, 2.26, 1.14, 2.26, 1.45, 2.29),
        (QWEN_14B, "TL;DR"): (4.12, 2.15, 1.91, 4.17, 2.25, 2.15, 0.91, 1.37, 3.15),
        (QWEN_14B, "UFB"): (1.24, 2.48, 1.01, 1.87, 3.16, 2.21, 2.69, 3.11, 1.98),
    },
)
# The paper does not name the models; those of Table 1's first block have the same figures.
TABLE_21 = Table(
    ("Online DPO", "Online CW-DPO", "Online WS-DPO"),
    {(OPT_13B, "HH-RLHF"): (85.3, 55.1, 56.3), (OPT_13B, "TL;DR"): (66.9, 46.2, 44.1)},
)
TABLE_22 = Table(
    ("CW-DPO (online)", "CW-DPO (offline)"),
    {(OPT_13B, "HH-RLHF"): (55.1, 61.3), (OPT_13B, "TL;DR"): (46.2, 56.6)},
)
TABLE_23 = Table(
    THREE,
    {
        ("askacademia", QWEN_7B): (53.6, 55.1, 56.4),
        ("askacademia", QWEN_14B): (50.6, 53.3, 55.1),
        ("askbaking", QWEN_7B): (49.1, 50.9, 51.4),
        ("askbaking", QWEN_14B): (56.6, 54.5, 58.4),
        ("askengineers", QWEN_7B): (56.9, 58.0, 59.1),
        ("askengineers", QWEN_14B): (54.9, 57.2, 55.4),
        ("askphilosophy", QWEN_7B): (58.1, 59.1, 60.0),
        ("askphilosophy", QWEN_14B): (51.0, 58.2, 56.8),
    },
)
TABLE_24 = Table(
    ("Harmless: CW-DPO", "Harmless: WS-DPO", "Helpful: CW-DPO", "Helpful: WS-DPO"),
    {
        ("Harmless + Helpful", "50% + 50%"): (60.5, 57.1, 63.6, 58.9),
        ("Harmless + Helpful", "80% + 20%"): (61.6, 59.3, 60.5, 54.8),
        ("Harmless + Helpful", "20% + 80%"): (56.1, 52.2, 67.1, 62.4),
    },
)
TABLE_25 = Table(
    ("5%", "10%", "15%", "20%"),
    {
        ("Harmful labels", "CW-DPO"): (69.3, 67.1, 65.7, 65.1),
        ("Harmful labels", "WS-DPO"): (70.1, 66.0, 64.7, 62.2),
    },
)
TABLE_26 = Table(
    ("Human", "WS-DPO", "PairRM", "CW-DPO"),
    {
        (QWEN_7B, "HH-RLHF"): (71.1, 72.0, 71.6, 75.2),
        (QWEN_7B, "TL;DR"): (61.2, 60.1, 62.2, 64.4),
    },
)
# Figure 3, right: what its text says of CW-DPO with 20 % of the labels, and of DPO with all.
FIGURE_3_RIGHT = {"CW-DPO, 20%": 70.3, "DPO, 100%": 69.7}
