"""Who may send requests, and what the instances are shown for it."""

from collections.abc import Mapping

from .errors import UnauthorizedError
from .keyring import Keyring
from .protocol import Headers
from .server import Request

_SHOWN = frozenset(("authorization", "x-api-key"))


class Guard:
    """Lets clients in that show a known key, a certificate of the known CAs, or whatever of the two is asked for."""

    def __init__(self, keys: Keyring | None = None, *, certificates: bool = False) -> None:
        self._keys = keys
        self._certificates = certificates

    def admit(self, request: Request) -> str:
        """Return the name of the client's key, empty where none is asked for. Raises :class:`UnauthorizedError`."""
        if self._certificates and not request.transport_info("peercert"):
            raise UnauthorizedError("expected a client certificate of a CA that this server knows")
        if self._keys is None:
            return ""
        shown = _shown_key(request.headers)
        if not shown:
            raise UnauthorizedError("expected an API key: Authorization: Bearer KEY, or x-api-key: KEY")
        name = self._keys.find(shown)
        if name is None:
            raise UnauthorizedError("the API key is not known here")
        return name


class BackendKey:
    """The key that the instances are shown: the client's own, or one of the proxy's in its place."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"<BackendKey {'set' if self._key else 'of the client'}>"

    def exchange(self, key: str) -> None:
        """Show ``key`` from here on."""
        self._key = key

    def replace_in(self, headers: Headers) -> Headers:
        """Return the headers that go to the instances. They know only ``Authorization`` (vLLM 0.23)."""
        if self._key:
            others = [(name, value) for name, value in headers if name.lower() not in _SHOWN]
            return [*others, ("Authorization", f"Bearer {self._key}")]
        names = {name.lower(): value for name, value in headers if name.lower() in _SHOWN}
        if "x-api-key" in names and "authorization" not in names:
            return [*headers, ("Authorization", f"Bearer {names['x-api-key']}")]
        return headers


def _shown_key(headers: Mapping[str, str]) -> str:
    """Return what the clients of OpenAI send, or those of Anthropic."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
