"""Collects what the documentation site is built of into a folder, for `make docs`.

The folder has the layout of the repository, so that links between pages lead to the same pages on
GitHub and in the site: the pages of the navigation, what they link to, and the references of
commands, Python and REST, which are written from the parsers, the docstrings and openapi.json. A
linked file of code becomes a page.

python docs/site/sources.py FOLDER
"""

from __future__ import annotations

import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "zensical.toml"
REFERENCES = ("commands.py", "python_api.py", "rest_api.py")
STYLES = "docs/site/style.css"
# What the reference of REST links to.
CONTRACT = "openapi/openapi.json"
# Files that a browser shows, and a site serves as they are.
AS_THEY_ARE = {".css", ".json", ".png", ".svg"}
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh"}
LINK = re.compile(r"(?<=\]\()[^)\s#]+(?=[)#])")
FENCE = re.compile(r"(?ms)^( *)(```+).*?^\1\2$")


def main(folder: Path) -> None:
    """Write the sources anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in sources().items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def sources() -> dict[str, bytes]:
    """All files of the site, by their paths.

    Raises: FileNotFoundError for a page or a link that leads nowhere.
    """
    written = {path: page for name in REFERENCES for path, page in reference(name).items()}
    found = {**written, STYLES: (ROOT / STYLES).read_bytes()}
    waiting = [CONTRACT, *(path for path in pages_of(navigation()) if path not in written)]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = staged(path)
        if path.endswith(".md"):
            waiting += [target for target, _ in linked(path) if target not in written]
    return {as_page(path): content for path, content in found.items()}


def reference(name: str) -> dict[str, bytes]:
    """The pages that one of the scripts beside this one writes."""
    pages: dict[str, str] = runpy.run_path(str(Path(__file__).with_name(name)))["pages"]()
    return {path: text.encode() for path, text in pages.items()}


def navigation() -> list[Any]:
    """The navigation of the site: paths, and titles with paths or further entries."""
    nav: list[Any] = tomllib.loads(CONFIG.read_text())["project"]["nav"]
    return nav


def pages_of(entry: Any) -> Iterator[str]:
    """The paths in a part of the navigation, in the order in which one reads."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


def staged(path: str) -> bytes:
    """A file of the repository as the site shows it."""
    if as_page(path) == path and not path.endswith(".md"):
        return (ROOT / path).read_bytes()
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        of_code = {written for target, written in linked(path) if as_page(target) != target}
        text = LINK.sub(lambda link: f"{link[0]}.md" if link[0] in of_code else link[0], text)
    else:
        language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
        head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
        text = f"{head}`````` {{.{language} linenums='1'}}\n{text}``````\n"
    return text.encode()


def as_page(path: str) -> str:
    """Where the site has it."""
    return path if Path(path).suffix in {".md", *AS_THEY_ARE} else f"{path}.md"


def linked(path: str) -> Iterator[tuple[str, str]]:
    """The files that a page links to: their paths, and the links as they are written."""
    folder = (ROOT / path).parent
    for written in LINK.findall(FENCE.sub("", (ROOT / path).read_text())):
        if not re.match(r"[a-z]+:", written):
            target = (folder / written).resolve()
            if not target.is_file():
                raise FileNotFoundError(f"{path}: the link {written} leads to no file")
            yield target.relative_to(ROOT).as_posix(), written


if __name__ == "__main__":
    main(Path(sys.argv[1]))
