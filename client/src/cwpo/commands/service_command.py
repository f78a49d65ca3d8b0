"""Commands that talk to a service."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cwpo.cli import Command
from cwpo.client import Client
from cwpo.transport import ClientSettings
from cwpo.types import Pairs, Truncation

TruncationFlag = Annotated[
    Truncation,
    Field(
        description="Treatment of rows that are too long for the annotator: `error` rejects them, "
        "`prompt_left` drops the oldest tokens of their prompts."
    ),
]


ColumnsFlag = Annotated[
    str | None,
    Field(
        description="Names of the columns in the input, where they are others than those needed: "
        "`prompt=question,response_a=answer_1,response_b=answer_2`."
    ),
]

PairsFlag = Annotated[
    Pairs | None,
    Field(
        description="Pairs to make of rows that have a list of `responses` in place of two: "
        "`best_worst` one pair, `adjacent` each response and the next one in the ranking, `all` "
        "each two. By default such rows are rejected."
    ),
]

MaxErrorFlag = Annotated[
    float | None,
    Field(
        gt=0,
        lt=0.5,
        description="Add the column `certified`: true for the labels of which, by a certificate of "
        "the annotator (`cwpo evaluate annotator --certify`), at most this share is wrong. By "
        "default there is no such column.",
    ),
]


class ServiceCommand(Command):
    """Base of the commands that talk to a service."""

    url: str = Field(
        ClientSettings.model_fields["url"].default, description="Address of the cwpo service."
    )
    api_key: str | None = Field(
        None,
        description="API key, if the service requires one. Set it as CWPO_API_KEY rather than as a "
        "flag, which other users of the machine can see.",
    )

    def client(self) -> Client:
        """A client of the service."""
        return Client(self.url, self.api_key)
