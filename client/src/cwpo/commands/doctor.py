"""`cwpo doctor`: what is wrong with an installation and its surroundings, and how to mend it."""

from __future__ import annotations

import json
from dataclasses import asdict

from pydantic import Field, SecretStr

from cwpo.cli import AsJson
from cwpo.commands.service_command import ServiceCommand
from cwpo.errors import CwpoError
from cwpo.findings import Finding, Places, findings


class Doctor(ServiceCommand):
    """Look for what is wrong: installation, versions, GPU, disk, service, Redis, store, clocks.

    Each finding is a line: `ok`, `skipped` for what was not named, `warning`, or `wrong`, with how
    to mend it. Nothing is changed; in the store, a probe is written, read and deleted. Exits with 1
    if anything is wrong.

    Example:
        cwpo doctor --url http://127.0.0.1:8000 --store-url s3://bucket/cwpo
    """

    redis_url: SecretStr | None = Field(
        None,
        description="URL of the Redis or Valkey server of the job queue; by default it is not "
        "looked at.",
    )
    store_url: str | None = Field(
        None,
        description="Folder or fsspec URL (s3://...) of uploads and results; by default it is not "
        "looked at.",
    )
    json_: AsJson = False

    def cli_cmd(self) -> None:
        """Print the findings."""
        redis_url = self.redis_url
        places = Places(
            url=self.url,
            is_url_given="url" in self.model_fields_set,
            api_key=self.api_key,
            redis_url=None if redis_url is None else redis_url.get_secret_value(),
            store_url=self.store_url,
        )
        found = []
        for finding in findings(places):
            found.append(finding)
            if not self.json_:
                print(_line(finding), flush=True)
        wrong = sum(finding.level == "wrong" for finding in found)
        if self.json_:
            told = {"healthy": not wrong, "findings": [asdict(finding) for finding in found]}
            print(json.dumps(told, indent=2))
        if wrong:
            raise CwpoError(f"{wrong} of {len(found)} findings are wrong: see above")


def _line(finding: Finding) -> str:
    line = f"{finding.level:<8} {finding.subject:<9} {finding.said}"
    return line if finding.fix is None else f"{line}; to mend it: {finding.fix}"
