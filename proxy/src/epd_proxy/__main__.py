"""The console script ``epd-proxy``."""

import asyncio
import contextlib
import fcntl
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from . import logs, memory
from .app import serve
from .config import ProxyConfig
from .errors import ConfigError
from .settings import load_config
from .workers import Shared, run_workers

_FILE_TABLE_MAX = 65_536


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy until it is stopped. Returns the exit code: 0, or 2 for a configuration that cannot work."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv, os.environ)
        logs.set_up(config.logging.level, config.logging.style)
        _allow_files()
        if config.listen.workers > 1:
            return run_workers(config, _serve)
        return _serve(config)
    except ConfigError as error:
        return _refuse(error)
    except OSError as error:
        return _fail(error)


def _serve(config: ProxyConfig, shared: Shared | None = None) -> int:
    memory.set_up()
    _ready_file_table()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config, shared))
    except ConfigError as error:  # of a file that is only read now
        return _refuse(error)
    except OSError as error:
        return _fail(error)
    return 0


def _refuse(error: ConfigError) -> int:
    noun = "fault" if len(error.faults) == 1 else "faults"
    sys.stderr.write(f"epd-proxy: {len(error.faults)} {noun} in the configuration:\n")
    sys.stderr.writelines(f"  - {fault}\n" for fault in error.faults)
    return 2


def _allow_files() -> None:
    """Raise the number of open files to what is allowed: each stream takes two, and 1024 is a usual default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _ready_file_table() -> None:
    """Have the kernel's table of this process's files as large as it may get, up to 65,536 entries of 8 bytes.

    It doubles as files are opened, at 64, 128, 256 and so on, and each stream takes two. Once there are threads, that
    waits until no core looks at the old one any more (``expand_fdtable`` in Linux's fs/file.c), and all streams wait
    with it: 4 to 9 ms were measured at 256.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError), Path(os.devnull).open() as file:  # no room for it now: then it grows as ever
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, min(most, _FILE_TABLE_MAX) - 1))


def _fail(error: OSError) -> int:
    sys.stderr.write(f"epd-proxy: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
