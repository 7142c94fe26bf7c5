"""The only package that opens sockets to backends: an HTTP/1.1 client of its own, on httptools.

``connection`` speaks on one connection, ``kept`` knows the idle ones, ``dialing`` opens new ones, ``client`` decides
which is used. What goes wrong is raised as :class:`epd_proxy.errors.BackendError`.
"""

from .call import Call
from .client import Upstream
from .response import UpstreamResponse

__all__ = ["Call", "Upstream", "UpstreamResponse"]
