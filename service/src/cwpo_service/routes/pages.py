"""GET /docs: the documentation of the REST interface, without files from other servers."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

from cwpo_service.problems import ProblemError

router = APIRouter(include_in_schema=False)

# Allows scripts and styles from the service's own files only, and no frame around the page. Swagger
# UI has its icons as data: images in its style sheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGES = files("cwpo_service.pages")
_SWAGGER = files("fastapi_swagger.resources")
_FILES = {
    "docs.js": (_PAGES, "text/javascript"),
    "swagger-ui-bundle.js": (_SWAGGER, "text/javascript"),
    "swagger-ui.css": (_SWAGGER, "text/css"),
    "favicon-32x32.png": (_SWAGGER, "image/png"),
}


@router.get("/docs")
async def docs() -> Response:
    """The page."""
    page = _PAGES.joinpath("docs.html").read_bytes()
    return Response(page, media_type="text/html", headers=_HEADERS)


@router.get("/docs/{name}")
async def docs_file(name: str) -> Response:
    """A file of the page. Raises: ProblemError, 404 for any other."""
    if name not in _FILES:
        raise ProblemError(404, f"the page has no file {name[:64]!r}", reason="unknown")
    folder, media_type = _FILES[name]
    content = folder.joinpath(name).read_bytes()
    return Response(content, media_type=media_type, headers=_HEADERS)
