"""The pages for browsers: the service's own at /, and the documentation of the REST interface."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Literal

from fastapi import APIRouter, Request, Response

from cwpo_service.problems import ProblemError

router = APIRouter(include_in_schema=False)

# Allows scripts and styles from the service's own files only, and no frame around the page. Swagger
# UI has its icons as data: images in its style sheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The service's own page never makes HTML of text, and browsers that know this rule enforce it.
_OWN_POLICY = f"{_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
_HEADERS = {
    # Asked for again each time, and answered with 304 unless the service was upgraded.
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_Folder = Literal["pages", "site", "swagger"]
_FOLDERS: dict[_Folder, Traversable] = {
    "pages": files("cwpo_service.pages"),
    "site": files("cwpo_service.pages").joinpath("site"),
    "swagger": files("fastapi_swagger.resources"),
}
_DOCS_FILES: dict[str, _Folder] = {
    "docs.js": "pages",
    "swagger-ui-bundle.js": "swagger",
    "swagger-ui.css": "swagger",
    "favicon-32x32.png": "swagger",
}
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


@router.get("/")
async def page(request: Request) -> Response:
    """The page of the service. It needs no API key; what it calls may need one."""
    return _file(request, "site", "index.html", _OWN_POLICY)


@router.get("/review")
async def review() -> Response:
    """The part of the page where people answer."""
    return Response(status_code=307, headers={**_HEADERS, "Location": "./#review"})


@router.get("/site/{name}")
async def page_file(request: Request, name: str) -> Response:
    """A file of that page. Raises: ProblemError, 404 for any other."""
    if name not in _site_files():
        raise _unknown(name)
    return _file(request, "site", name, _OWN_POLICY)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The documentation."""
    return _file(request, "pages", "docs.html", _POLICY)


@router.get("/docs/{name}")
async def docs_file(request: Request, name: str) -> Response:
    """A file of the documentation. Raises: ProblemError, 404 for any other."""
    if name not in _DOCS_FILES:
        raise _unknown(name)
    return _file(request, _DOCS_FILES[name], name, _POLICY)


def _file(request: Request, folder: _Folder, name: str, policy: str) -> Response:
    """The file, or 304 if the browser has it."""
    content, etag = _read(folder, name)
    headers = {**_HEADERS, "Content-Security-Policy": policy, "ETag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_MEDIA_TYPES[PurePath(name).suffix], headers=headers)


@cache
def _read(folder: _Folder, name: str) -> tuple[bytes, str]:
    """The content of a file, and its ETag."""
    content = _FOLDERS[folder].joinpath(name).read_bytes()
    return content, f'"{sha256(content).hexdigest()[:32]}"'


@cache
def _site_files() -> frozenset[str]:
    return frozenset(file.name for file in _FOLDERS["site"].iterdir())


def _unknown(name: str) -> ProblemError:
    return ProblemError(404, f"the page has no file {name[:64]!r}", reason="unknown")
