"""The host names for which requests are answered.

A web page can make its own domain resolve to 127.0.0.1 (DNS rebinding), and then use a service on
its reader's machine. Its requests have that domain in `Host`, and never an IP address.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit


class AllowedHosts:
    """The names in `Host` that are answered, besides IP addresses and localhost.

    Args:
        names: names separated by commas; `*.example.org` for all names below a domain, `*` for all.
    """

    def __init__(self, names: str) -> None:
        listed = [name.strip().lower() for name in names.split(",") if name.strip()]
        self._any = "*" in listed
        self._names = frozenset(["localhost", *listed])
        self._domains = tuple(name.removeprefix("*") for name in listed if name.startswith("*."))
        # Nearly all requests have the same one.
        self.allow = lru_cache(16)(self._allow)

    def _allow(self, header: str | None) -> bool:
        """Whether a request with this `Host` is answered; without the header (HTTP/1.0) it is."""
        if self._any or header is None:
            return True
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return name in self._names or name.endswith(self._domains) or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
