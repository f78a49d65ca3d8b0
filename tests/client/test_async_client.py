"""The sync and the async client are twins."""

import inspect

import pytest

from cwpo.async_client import AsyncClient
from cwpo.client import Client
from cwpo.connection import AsyncConnection, Connection
from cwpo.resources.annotations import Annotations, AsyncAnnotations
from cwpo.resources.files import AsyncFiles, Files
from cwpo.resources.jobs import AsyncJobs, Jobs

TWINS = [
    (Client, AsyncClient),
    (Annotations, AsyncAnnotations),
    (Files, AsyncFiles),
    (Jobs, AsyncJobs),
    (Connection, AsyncConnection),
]
# Requests at a time: only asyncio can have several.
ONLY_ASYNC = {("annotate", "concurrency"), ("rank", "concurrency")}


def methods(kind):
    return {
        name: method
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


def signature(name, method):
    """Parameters and result, the classes of asyncio by the names of their twins."""
    given = inspect.signature(method)
    parameters = [
        str(parameter).replace("AsyncConnection", "Connection")
        for parameter in given.parameters.values()
        if (name, parameter.name) not in ONLY_ASYNC
    ]
    return parameters, str(given.return_annotation).replace("AsyncIterator", "Iterator")


def docstring(name, method):
    lines = (inspect.getdoc(method) or "").splitlines()
    own = [f"{parameter}:" for method_name, parameter in ONLY_ASYNC if method_name == name]
    return [line for line in lines if not line.strip().startswith(tuple(own))]


@pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_twins_have_the_same_methods_signatures_and_docstrings(sync, twin):
    ours, theirs = methods(sync), methods(twin)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert signature(name, ours[name]) == signature(name, theirs[name]), name
        assert docstring(name, ours[name]) == docstring(name, theirs[name]), name


def test_a_client_has_the_resources_of_its_kind():
    for client, files, jobs in ((Client(), Files, Jobs), (AsyncClient(), AsyncFiles, AsyncJobs)):
        assert (type(client.files), type(client.jobs)) == (files, jobs)
