"""How the process of a command ends."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command, whichever distribution it is from; they do not change.

    meaning: what it says, in the words of the docs.
    """

    meaning: str

    DONE = 0, "The command is done; a service or a worker was told to stop."
    FAILED = (
        1,
        "It failed. Standard error says in one line why, and what to do about it: the value of a "
        "flag, a setting, an input, what the service answered, a job that failed.",
    )
    USAGE = 2, "The command line is wrong: an unknown flag, one without a value, no argument."
    STOPPED = (
        75,
        "A training was stopped by SIGTERM, and has saved a checkpoint: the same command with "
        "`--resume` goes on from it.",
    )
    INTERRUPTED = 130, "Ctrl-C (SIGINT)."
    UNREAD = 141, "Nobody reads its output any more, as when `head` has seen enough (SIGPIPE)."
    TERMINATED = 143, "It was ended by SIGTERM."

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        """The code, which knows what it means."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member
