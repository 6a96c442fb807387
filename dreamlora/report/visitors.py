"""Who may see a live page: whoever has its token, from the page itself. Every user of a machine can connect to it."""

from __future__ import annotations

import hmac
import secrets
from email.message import Message
from urllib.parse import urlsplit

HOST = "127.0.0.1"
_NAMES = {HOST, "localhost", "::1"}
_OWN_SITE = (None, "same-origin", "none")


class Door:
    """The token of one live page, and the cookie that a browser keeps it as.

    Args:
        port: of the page: cookies know hosts alone, and two pages have one each.

    Attributes:
        token: random; who knows it, may see the page.
    """

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        self._name = f"dreamlora-{port}"

    @property
    def cookie(self) -> str:
        """What a browser is told to keep: other sites do not make it send that, and no script can read it."""
        return f"{self._name}={self.token}; Path=/; HttpOnly; SameSite=Strict"

    def has_token(self, query: str) -> bool:
        """Whether the query of an address is the token's."""
        return _same(query, f"token={self.token}")

    def has_cookie(self, headers: Message) -> bool:
        """Whether a request brings the cookie."""
        pairs = (pair.strip() for line in headers.get_all("Cookie", []) for pair in line.split(";"))
        return any([_same(pair, f"{self._name}={self.token}") for pair in pairs])


def is_foreign(headers: Message) -> bool:
    """Whether a request is of another site's making.

    A page from elsewhere can point a name of its own at 127.0.0.1, but not forge the name that it is asked by.
    """
    hosts = headers.get_all("Host", [])
    if len(hosts) != 1 or not _is_this_machine(hosts[0]):
        return True
    return headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}" or (
        headers.get("Sec-Fetch-Site") not in _OWN_SITE
    )


def _is_this_machine(host: str) -> bool:
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return False
    return parts.netloc == host and "@" not in host and (name or "").removesuffix(".") in _NAMES


def _same(theirs: str, ours: str) -> bool:
    """Without telling by the time it takes how much of it is right."""
    return hmac.compare_digest(theirs.encode("utf-8", "surrogatepass"), ours.encode())
