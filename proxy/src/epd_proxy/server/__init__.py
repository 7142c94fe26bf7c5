"""The only package that listens: an HTTP/1.1 server of its own, on httptools, as little as the proxy needs.

``reading`` makes requests of what comes over a connection, ``connection`` answers them in turn, ``request`` is what a
handler gets, ``response`` and ``stream`` what it gives back, ``routes`` says which handler it is, ``listener`` owns the
sockets and the time-outs.
"""

from .listener import Listener, Waits
from .request import Request
from .response import Headers, Response
from .routes import Handler, Routes, error_response
from .stream import Stream

__all__ = ["Handler", "Headers", "Listener", "Request", "Response", "Routes", "Stream", "Waits", "error_response"]
