"""What `cwpo doctor` finds of an installation, a service and its clock."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from cwpo import checks
from cwpo.cli import run
from cwpo.commands.doctor import Doctor
from cwpo.findings import Finding, Places, findings
from harness import serving

KEY = "wonderland"


def of(subject, found):
    return [finding for finding in found if finding.subject == subject]


def levels(found):
    return {finding.level for finding in found}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice:{sha256(KEY.encode()).hexdigest()}\n")
    with serving(api_keys_file=keys) as service:
        yield service


def test_a_service_that_is_well_is_found_so(service):
    found = list(checks.service(Places(service.url, api_key=KEY)))
    assert levels(found) == {"ok", "skipped"}
    assert found[0].said == f"{service.url} hosts null, revision null (null on cpu in float32)"
    assert of("clock", found)[0].said == "that of the service agrees with this one"
    (jobs,) = of("jobs", found)
    assert (jobs.level, "no job queue" in jobs.said) == ("skipped", True)


def test_a_key_that_is_refused_says_how_to_set_it(service):
    for key in (None, "wrong"):
        found = list(checks.service(Places(service.url, api_key=key)))
        assert found[0].level == "wrong"
        assert "does not accept the API key" in found[0].said
        assert found[0].fix == "set CWPO_API_KEY to a key that it knows"


def test_a_service_that_is_not_there_is_wrong_only_if_it_was_named():
    (named,) = checks.service(Places("http://127.0.0.1:9"))
    (default,) = checks.service(Places("http://127.0.0.1:9", is_url_given=False))
    assert (named.level, default.level) == ("wrong", "skipped")
    assert "no answer from http://127.0.0.1:9" in named.said
    assert "cwpo up" in named.fix


@pytest.fixture
def server():
    """`server(status, body, date)`: the url of one that always answers so."""
    servers = []

    def start(status, body, date=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response_only(status)
                if date is not None:
                    self.send_header("Date", format_datetime(date, usegmt=True))
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *arguments):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


def test_what_is_no_cwpo_service_is_wrong(server):
    for status, body in ((200, {"hello": "world"}), (404, {})):
        found = next(iter(checks.service(Places(server(status, body)))))
        assert (found.level, "no cwpo service" in found.said) == ("wrong", True)


def test_a_service_that_is_loading_is_not_ready(server):
    problem = {"title": "Service Unavailable", "status": 503, "detail": "the annotator is loading"}
    found = list(checks.service(Places(server(503, problem))))
    assert levels(found) == {"wrong"}
    assert any(
        "not ready: 503 Service Unavailable: the annotator is loading" in f.said for f in found
    )


@pytest.mark.parametrize(
    ("behind", "level", "said"),
    [
        (timedelta(0), "ok", "agrees"),
        (timedelta(seconds=90), "warning", "s behind this one"),
        (-timedelta(seconds=90), "warning", "s ahead of this one"),
        (timedelta(hours=1), "wrong", "3,60"),
    ],
)
def test_the_clock_of_a_service_is_compared(server, behind, level, said):
    url = server(200, {}, datetime.now(UTC) - behind)
    (clock,) = of("clock", checks.service(Places(url)))
    assert (clock.level, said in clock.said) == (level, True), clock.said


@pytest.fixture
def distributions(tmp_path, monkeypatch):
    """`distributions(name=(version, *requirements))`: puts them before those that are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**given):
        for name, (version, *requirements) in given.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            lines = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}"]
            lines += [f"Version: {version}", *(f"Requires-Dist: {line}" for line in requirements)]
            (folder / "METADATA").write_text("\n".join(lines) + "\n")

    return write


def test_distributions_of_several_versions_are_wrong_with_the_command_that_mends_it(distributions):
    distributions(cwpo=("0.10.0",), cwpo_worker=("0.9.1",))
    (versions,) = [found for found in checks.installation() if "differ" in found.said]
    assert versions.level == "wrong"
    assert "cwpo 0.10.0" in versions.said
    assert "cwpo-worker 0.9.1" in versions.said
    assert "'cwpo==0.10.0'" in versions.fix
    assert "'cwpo-worker==0.10.0'" in versions.fix


def test_requirements_that_are_not_met_are_named(distributions):
    distributions(
        cwpo=(
            "0.2.0",
            "pytest>=10000",
            "no-such-package>=1",
            "another-one; sys_platform == 'none'",
            "and-another; extra == 'more'",
            "pytest>=1",
        )
    )
    wrong = [found for found in checks.installation() if "cwpo needs" in found.said]
    assert [found.fix for found in wrong] == [
        "pip install 'pytest>=10000'",
        "pip install 'no-such-package>=1'",
    ]
    assert "and it is not installed" in wrong[1].said


def test_a_full_disk_is_a_warning(tmp_path):
    there = tmp_path / "not" / "yet"
    (full,) = checks.disk("things", there, 1 << 62, "WHERE")
    assert full.level == "warning"
    assert full.fix.endswith(": WHERE")
    (roomy,) = checks.disk("things", there, 1, "WHERE")
    assert (roomy.level, roomy.fix) == ("ok", None)


def test_a_check_that_fails_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_check.py").write_text(
        "def look(places):\n    raise OSError('no, thanks')\n"
    )
    folder = tmp_path / "broken-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    entries = "[cwpo.checks]\nbroken = broken_check:look\nmissing = no_such_module:look\n"
    (folder / "entry_points.txt").write_text(entries)
    found = list(findings(Places("http://127.0.0.1:9", is_url_given=False)))
    (broken,) = of("broken", found)
    assert broken.level == "wrong"
    assert "broken_check cannot look: OSError: no, thanks" in broken.said
    assert of("missing", found)[0].fix == "install it anew: pip install missing"


def doctor(capsys, *arguments):
    """What the command prints, and its message if it fails."""
    message = None
    try:
        run(Doctor, list(arguments), "cwpo doctor")
    except SystemExit as ending:
        message = ending.code
    return capsys.readouterr().out, message


def test_the_command_fails_if_anything_is_wrong(service, capsys):
    out, message = doctor(capsys, "--url", service.url, "--api-key", "wrong")
    lines = out.splitlines()
    wrong = [line for line in lines if line.startswith("wrong")]
    assert any("to mend it: set CWPO_API_KEY to a key that it knows" in line for line in wrong)
    assert message == f"cwpo doctor: {len(wrong)} of {len(lines)} findings are wrong: see above"


def test_the_findings_as_json(service, capsys):
    out, _ = doctor(capsys, "--url", service.url, "--api-key", KEY, "--json")
    told = json.loads(out)
    found = [Finding(**finding) for finding in told["findings"]]
    assert told["healthy"] == ("wrong" not in levels(found))
    assert of("service", found)[0].level == "ok"
    assert {"python", "versions", "disk", "service"} <= {finding.subject for finding in found}


@pytest.mark.slow
def test_doctor_looks_at_all_distributions_and_prints_no_secret():
    command = [sys.executable, "-m", "cwpo", "doctor", "--url", "http://127.0.0.1:9"]
    command += ["--api-key", "hush", "--redis-url", "redis://:hush@127.0.0.1:9/0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    subjects = {line[9:18].strip() for line in result.stdout.splitlines()}
    assert {"python", "versions", "torch", "gpu", "files", "redis", "store", "service"} <= subjects
    assert "hush" not in result.stdout + result.stderr
