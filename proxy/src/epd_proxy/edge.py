"""Configuration of how the proxy meets the outside: its operators, and who may do what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdminConfig:
    """Where operators reach the proxy; port 0 is nowhere. ``keys_file`` lists the keys that they show."""

    host: str = "127.0.0.1"
    port: int = 0
    keys_file: str = ""

    def faults(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [] if 0 <= self.port <= 65535 else [f"--admin-port: expected 0 to 65535, found {self.port}"]
        if self.port and not self.keys_file:
            found.append("--admin-port: expected --admin-keys-file FILE with it, a key a line")
        return found
