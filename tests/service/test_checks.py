"""What `cwpo doctor` says of the limit of open files."""

import resource

import pytest

from cwpo_service.checks import open_files

NONE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "level", "fix"),
    [
        (NONE, NONE, "ok", None),
        (1024, 4096, "ok", None),
        (256, 4096, "warning", "`ulimit -n 4096`"),
        (256, NONE, "warning", "`ulimit -n 65536`"),
        (256, 256, "warning", "LimitNOFILE"),
    ],
)
def test_few_open_files_are_a_warning_with_the_command_that_mends_it(soft, hard, level, fix):
    found = open_files(soft, hard)
    assert found.level == level
    assert found.fix is None if fix is None else fix in found.fix
