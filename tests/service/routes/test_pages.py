"""The pages of the service, in a real browser."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_documentation_is_drawn_with_the_service_s_own_files(service, tmp_path):
    page = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            # No other server is found, so what the page shows came from the service.
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={tmp_path}",
            *("--virtual-time-budget=20000", "--dump-dom", f"{service.url}/docs"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert set(re.findall(r'data-path="([^"]+)"', page.stdout)) >= {"/annotate", "/jobs/{job_id}"}
    complaints = [line for line in page.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
