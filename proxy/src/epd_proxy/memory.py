"""How the process deals with memory: what is kept for the next request, and how often garbage is looked for."""

import ctypes
import gc
import os

# Of mallopt(3), in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MIB = 1024 * 1024
_BLOCK_BYTES = _MIB
_KEPT_BYTES = 16 * _MIB


def set_up() -> None:
    """Set both for this process. glibc's own variables (``MALLOC_…``) go before; another C library is left alone."""
    _keep_blocks()
    _spare_collector()


def _keep_blocks() -> None:
    """Keep up to 16 MiB of what is freed, and give blocks of 1 MiB or more back at once.

    By default glibc gives back what is free at the top of its heap from 128 KiB on, so that a request with a picture
    pays for every page of its buffers anew; and it comes to keep blocks of up to 32 MiB, and with them more than a
    request's body after its end (tests/proxy/test_bodies.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_MMAP_THRESHOLD, _BLOCK_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def _spare_collector() -> None:
    """Have the garbage collector look seldom, and never at what the modules are made of.

    What ends well leaves nothing large in circles, nor does what failed or the client gave up
    (tests/proxy/test_garbage.py). By default the collector would look after every 700 objects, and at all there is
    from time to time: a pause for every stream. An open stream has some 90 objects. Here it looks at the middle
    generation after 14,000 new ones, which takes 1 to 2 ms (5 when it was 44,000), and at all there are after 1.1
    million, of 12,000 streams: with 9,900 open ones that takes 210 ms. What goes is not subtracted once it has been
    looked at.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 5, 80)
