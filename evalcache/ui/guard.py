"""Who may ask the server of `evalcache ui`: a page of its own, in a browser that was opened with the address it printed. Pure.

Any page of the web can send requests to a port of this machine, and any user of this machine can connect to it. So:

* The ``Host`` is the one that was printed, or ``localhost``. A name of somebody else's that resolves to 127.0.0.1 (DNS rebinding)
  is not.
* ``Origin`` and ``Sec-Fetch-Site``, where a browser sends them, say that the request comes from a page of this server, or from
  nobody's. A request that asks something has to have an ``Origin``. Other ports of this host are other origins.
* Everything needs a secret. The address has one that works once; it is changed for a cookie that no script sees and that no other
  site's page makes the browser send.

Its limit: cookies know no ports, so a browser that visits *another* server on 127.0.0.1 shows it this one's.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from email.message import Message


class Guard:
    """The secrets of one server on ``port``, and who has them."""

    def __init__(self, port: int) -> None:
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self._name = f"evalcache-ui-{port}"
        self._session = secrets.token_urlsafe(32)
        self._token = secrets.token_urlsafe(32)

    @property
    def address(self) -> str:
        """What a person opens; works once."""
        return f"http://{self._hosts[0]}/?token={self._token}"

    @property
    def cookie(self) -> str:
        """For ``Set-Cookie``, once `admits` has said yes."""
        return f"{self._name}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def admits(self, token: str) -> bool:
        """Whether this is the token of the address. It is used up then, and `address` is another one."""
        good = _equal(token, self._token)
        if good:
            self._token = secrets.token_urlsafe(32)
        return good

    def knows(self, headers: Message) -> bool:
        """Whether the request has the cookie."""
        told = (part.strip().partition("=") for line in headers.get_all("Cookie", []) for part in line.split(";"))
        # Another server on this host may have set one of this name as well.
        return any(_equal(value, self._session) for name, _, value in told if name == self._name)

    def refuses(self, headers: Message, *, asks: bool = False, enters: bool = False) -> str | None:
        """Why a request is refused wherever it comes from this way, whatever secrets it has; None where it is not.

        Args:
            asks: it is a POST. enters: it is made with a token, by a person who may have found the address on some page.
        """
        hosts, origins, sites = (headers.get_all(name, []) for name in ("Host", "Origin", "Sec-Fetch-Site"))
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return "this address is not the one that evalcache ui printed"
        if (asks and not origins) or any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return "a page of another origin asked"
        if enters and _is_opened_by_a_person(headers):
            return None
        if not set(sites) <= ({"same-origin"} if asks else {"same-origin", "none"}):
            return "a page of another site asked"
        return None


def _is_opened_by_a_person(headers: Mapping[str, str] | Message) -> bool:
    """A navigation of a whole tab, not a frame or a request of a script's."""
    return headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())
