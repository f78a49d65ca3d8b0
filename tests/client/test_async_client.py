"""The sync and the async client are twins."""

import inspect

import pytest

from cwpo.async_client import AsyncClient
from cwpo.client import Client
from cwpo.connection import AsyncConnection, Connection
from cwpo.resources.annotations import Annotations, AsyncAnnotations
from cwpo.resources.files import AsyncFiles, Files
from cwpo.resources.jobs import AsyncJobs, AsyncSubmittedJob, Jobs, SubmittedJob

TWINS = [
    (Client, AsyncClient),
    (Annotations, AsyncAnnotations),
    (Files, AsyncFiles),
    (Jobs, AsyncJobs),
    (SubmittedJob, AsyncSubmittedJob),
    (Connection, AsyncConnection),
]


def methods(kind):
    return {
        name: method
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


def signature(method):
    """Parameters and result, the classes of asyncio by the names of their twins."""
    given = inspect.signature(method)
    parameters = [str(parameter).replace("Async", "") for parameter in given.parameters.values()]
    return parameters, str(given.return_annotation).replace("Async", "")


@pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_twins_have_the_same_methods_signatures_and_docstrings(sync, twin):
    ours, theirs = methods(sync), methods(twin)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert signature(ours[name]) == signature(theirs[name]), name
        assert inspect.getdoc(ours[name]) == inspect.getdoc(theirs[name]), name


def test_a_client_has_the_resources_of_its_kind():
    for client, files, jobs in ((Client(), Files, Jobs), (AsyncClient(), AsyncFiles, AsyncJobs)):
        assert (type(client.files), type(client.jobs)) == (files, jobs)
