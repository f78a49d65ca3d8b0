"""The line that tells users how many pairs training or evaluation leaves out, and why."""

from __future__ import annotations

from collections import Counter

from cwpo.datasets.triplets import by_reason

# Reasons (codes of an ItemError) that a larger limit of tokens would remove.
_LENGTH = {"too_long", "response_too_long"}


def left_out(reasons: Counter[str], total: int, *, limit: int, flag: str | None) -> str:
    """Such as "44 of 1,479 pairs left out: 44 response_too_long. Keep them with ...".

    Args:
        reasons: how many of the `total` pairs were left out for each reason.
        limit: most tokens that a pair's texts may have.
        flag: sets the limit; None where no flag of the command does.
    """
    text = f"{reasons.total():,} of {total:,} pairs left out: {by_reason(reasons)}."
    if not _LENGTH & reasons.keys():
        return text
    if flag is None:
        return f"{text} The model reads at most {limit:,} tokens."
    which = "them" if reasons.keys() <= _LENGTH else "those too long"
    return f"{text} Keep {which} with a larger `{flag}` than {limit:,} tokens."
