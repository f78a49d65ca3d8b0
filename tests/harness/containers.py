"""Images built by buildah and containers run by runc: neither needs a daemon.

A container here is as the chart makes one: a read-only root, /tmp in memory, user 10001, no
capabilities, no new privileges. It shares the network of the machine, or a namespace.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import TIMEOUT

ROOT = Path(__file__).parents[2]
BASE = "python:3.12-slim-bookworm"
TARGETS = ("worker", "service", "trainer")
USER = 10001
# Of torch, where the machine's pip knows no folder with one for CPUs.
_CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"


class Images:
    """The images of the Dockerfile, in a store of their own, which keeps layers between runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._pip = _PipOfTheMachine(folder)

    def build(self, target: str) -> str:
        """The name of the image of a target, for CPUs."""
        name = f"cwpo-{target}:test"
        self.buildah(
            *("bud", "--layers", "--format", "docker", "--isolation", "chroot", "--pull-never"),
            *("--build-arg", f"BASE={self.base()}", *self._pip.arguments(), *self._pip.mounts()),
            *("--target", target, "--tag", name, str(ROOT)),
        )
        return name

    def base(self) -> str:
        """The base of the Dockerfile; where no registry answers, one made from Debian."""
        own = "localhost/cwpo-base:test"
        known = self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()
        for name in (own, f"docker.io/library/{BASE}"):
            if name in known:
                return name
        try:
            self.buildah("pull", "--quiet", f"docker.io/library/{BASE}")
        except subprocess.CalledProcessError:
            self._make_base(own)
            return own
        return f"docker.io/library/{BASE}"

    def _make_base(self, name: str) -> None:
        """Debian with its Python where that of the real base is."""
        files = self.folder / "debian"
        shutil.rmtree(files, ignore_errors=True)
        _run(
            *("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm"),
            *(str(files), *_mirror()),
        )
        # In the real base, pip may install into the Python that it is of.
        for mark in files.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            mark.unlink()
        (files / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        container = self.buildah("from", "scratch").strip()
        self.buildah("copy", "--quiet", container, str(files), "/")
        path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.buildah("config", "--env", f"PATH={path}", container)
        pip = ("python", "-m", "pip", "install", "--quiet", "--upgrade", "pip")
        self.buildah("run", "--isolation", "chroot", *self._pip.mounts(), container, "--", *pip)
        self.buildah("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(files)

    def buildah(self, *words: str) -> str:
        """What a buildah command prints."""
        store, state = self.folder / "store", self.folder / "state"
        return _run("buildah", "--root", str(store), "--runroot", str(state), *words)

    def config(self, image: str) -> dict[str, Any]:
        """What the image says of itself: entry point, environment, user, health check."""
        found = json.loads(self.buildah("inspect", "--type", "image", image))
        return dict(found["Docker"]["config"])

    def size(self, image: str) -> str:
        """As buildah tells it, such as 581 MB."""
        return self.buildah("images", "--format", "{{.Size}}", image).strip()


class Container:
    """A container of an image, from its start to its end.

    Args:
        command: in the place of the image's entry point, or its arguments.
        environment: in addition to the image's.
        mounts: folders of the machine by their place in the container; they can be read only, but
            for those in `writable`.
        network: a network namespace of the machine (`ip netns`) in the place of its own network.
    """

    def __init__(
        self,
        images: Images,
        name: str,
        image: str,
        *,
        command: Sequence[str] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        mounts: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        network: str | None = None,
    ) -> None:
        self._images, self.name, self._network = images, name, network
        self._config = images.config(image)
        self._working = images.buildah("from", "--pull-never", image).strip()
        self.root = Path(images.buildah("mount", self._working).strip())
        self._bundle = images.folder / "bundles" / name
        shutil.rmtree(self._bundle, ignore_errors=True)
        self._bundle.mkdir(parents=True)
        self.log = self._bundle / "log"
        words = [*(command or self._config.get("Entrypoint") or ()), *arguments]
        self._write_config(words, environment or {}, mounts or {}, writable or {})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["runc", *self._state(), "run", "--bundle", str(self._bundle), name],
                stdout=log,
                stderr=log,
            )

    def is_healthy(self) -> bool:
        """Whether the health check of the image passes."""
        _, *check = self._config["Healthcheck"]["Test"]
        return self.run(*check).returncode == 0

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container."""
        return subprocess.run(
            ["runc", *self._state(), "exec", self.name, *words],
            capture_output=True,
            text=True,
            check=False,
        )

    def stop(self) -> int:
        """Send SIGTERM and wait; the exit status."""
        if self.process.poll() is None:
            subprocess.run(["runc", *self._state(), "kill", self.name, "TERM"], check=True)
        return self.process.wait()

    def remove(self) -> None:
        """End and remove it, whatever has happened."""
        subprocess.run(
            ["runc", *self._state(), "delete", "--force", self.name],
            capture_output=True,
            check=False,
        )
        self.process.wait()
        self._images.buildah("rm", self._working)

    def _state(self) -> tuple[str, str]:
        return "--root", str(self._images.folder / "runc")

    def _write_config(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        mounts: Mapping[str, Path],
        writable: Mapping[str, Path],
    ) -> None:
        _run("runc", "spec", "--bundle", str(self._bundle))
        path = self._bundle / "config.json"
        config = json.loads(path.read_text())
        config["root"] = {"path": str(self.root), "readonly": True}
        config["process"] |= {
            "terminal": False,
            "user": {"uid": USER, "gid": USER},
            "args": [*words],
            "cwd": self._config.get("WorkingDir") or "/",
            "env": [*self._config["Env"], *(f"{key}={environment[key]}" for key in environment)],
            "capabilities": {kind: [] for kind in config["process"]["capabilities"]},
            "noNewPrivileges": True,
        }
        namespaces = config["linux"]["namespaces"]
        namespaces = [each for each in namespaces if each["type"] != "network"]
        if self._network is not None:
            namespaces.append({"type": "network", "path": f"/run/netns/{self._network}"})
        config["linux"]["namespaces"] = namespaces
        config["mounts"] += [
            _tmpfs("/tmp"),
            *(_bound(place, folder, "ro") for place, folder in mounts.items()),
            *(_bound(place, folder, "rw") for place, folder in writable.items()),
        ]
        path.write_text(json.dumps(config))


def until(reached: Callable[[], bool], *watched: Container) -> None:
    """Wait for a condition; if one of the containers ends meanwhile, fail with its log."""
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        for container in watched:
            assert container.process.poll() is None, container.log.read_text()
        assert time.monotonic() < deadline, [each.log.read_text() for each in watched]
        time.sleep(0.2)


def readable(checkpoint: Path, folder: Path) -> Path:
    """A copy that all may read, as from a volume; weights are written for their owner alone."""
    shutil.copytree(checkpoint, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def key_lines(**keys: str) -> str:
    """The file of API keys, by the names of their owners."""
    hashed = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in keys.items()}
    return "".join(f"{name}:{digest}\n" for name, digest in hashed.items())


class _PipOfTheMachine:
    """How pip reaches an index from this machine: its settings, and the files that they name."""

    def __init__(self, folder: Path) -> None:
        listed = _run(sys.executable, "-m", "pip", "config", "list")
        found = dict(re.findall(r"(?m)^(?:global|:env:)\.([\w-]+)='(.*)'$", listed))
        names = ("cert", "find-links", "index-url", "extra-index-url", "trusted-host", "proxy")
        self._settings = {name: found[name] for name in names if name in found}
        lines = ["[global]", *(f"{name} = {value}" for name, value in self._settings.items())]
        self._file = folder / "pip.conf"
        self._file.write_text("\n".join([*lines, ""]))

    def mounts(self) -> list[str]:
        """For buildah."""
        paths = [
            word
            for value in self._settings.values()
            for word in value.split()
            if word.startswith("/") and Path(word).exists()
        ]
        places = {str(self._file): "/etc/pip.conf", **{path: path for path in paths}}
        return [word for path in places for word in ("-v", f"{path}:{places[path]}:ro")]

    def arguments(self) -> list[str]:
        """Build arguments that choose torch for CPUs, unless a folder of the machine has it."""
        if "find-links" in self._settings:
            return []
        torch = re.search(r"ARG TORCH=(\S+)", (ROOT / "Dockerfile").read_text())
        assert torch is not None
        chosen = {"TORCH": f"{torch[1]}+cpu", "PIP_EXTRA_INDEX_URL": _CPU_WHEELS}
        return [word for name in chosen for word in ("--build-arg", f"{name}={chosen[name]}")]


def _mirror() -> list[str]:
    """The Debian mirror that this machine uses, if it says so."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt").glob("sources.list.d/*")]
    text = "\n".join(place.read_text() for place in places if place.is_file())
    return re.findall(r"(?m)^(?:URIs:|deb).*?(https?://\S+/debian)/?(?:\s|$)", text)[:1]


def _tmpfs(place: str) -> dict[str, Any]:
    options = ["nosuid", "nodev", "mode=1777"]
    return {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options}


def _bound(place: str, folder: Path, access: str) -> dict[str, Any]:
    options = ["bind", access]
    return {"destination": place, "type": "bind", "source": str(folder), "options": options}


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    done.check_returncode()
    return done.stdout
