from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from containers import TARGETS, Container, Images


@pytest.fixture(scope="session")
def images() -> Images:
    folder = os.environ.get("CWPO_IMAGES_DIR")
    if folder is None:
        pytest.skip("CWPO_IMAGES_DIR is not set: make images-test")
    for tool in ("buildah", "runc", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    return Images(Path(folder).resolve())


@pytest.fixture(scope="session")
def built(images) -> dict[str, str]:
    """The names of the images by target."""
    return {target: images.build(target) for target in TARGETS}


@pytest.fixture
def containers(images) -> Iterator:
    """Starts containers, and removes them."""
    with ExitStack() as stack:

        def start(name, image, **options):
            container = Container(images, f"cwpo-{os.getpid()}-{name}", image, **options)
            stack.callback(container.remove)
            return container

        yield start
