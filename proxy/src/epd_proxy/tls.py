"""TLS towards clients and towards instances."""

import ssl
from pathlib import Path

from .edge import TlsConfig
from .errors import ConfigError


def server_context(config: TlsConfig) -> ssl.SSLContext | None:
    """Return what the clients' listener speaks; None for plain HTTP.

    A client's certificate is asked for, and checked, where there is a CA for it. One without is still let in: health
    checks have none, so who may do what is decided request by request. Raises :class:`ConfigError`.
    """
    if not config.cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, config)
    if config.client_ca_file:
        context.verify_mode = ssl.CERT_OPTIONAL
        _load_ca(context, "--tls-client-ca", config.client_ca_file)
    return context


def load_certificate(context: ssl.SSLContext, config: TlsConfig) -> None:
    """Have ``context`` show the certificate that the files hold now, from the next handshake on."""
    _load_chain(context, "--tls-cert and --tls-key", config.cert_file, config.key_file)


def read_certificate(config: TlsConfig) -> bytes:
    """Return the files' content, after a check that they belong together. Raises :class:`ConfigError`."""
    load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config)
    try:
        return Path(config.cert_file).read_bytes() + Path(config.key_file).read_bytes()
    except OSError as error:
        raise ConfigError([str(error)]) from error


def backend_context(config: TlsConfig) -> ssl.SSLContext:
    """Return what is spoken to instances whose URL begins with https. Raises :class:`ConfigError`."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if config.backend_ca_file:
        _load_ca(context, "--backend-tls-ca", config.backend_ca_file)
    if config.backend_cert_file:
        files = config.backend_cert_file, config.backend_key_file
        _load_chain(context, "--backend-tls-cert and --backend-tls-key", *files)
    if config.backend_verify == "off":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load_chain(context: ssl.SSLContext, flags: str, cert_file: str, key_file: str) -> None:
    try:
        # Without the callback a key with a password would be asked for on the terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
    except (OSError, ValueError) as error:
        expected = "expected a PEM certificate chain and its key, without a password"
        raise ConfigError([f"{flags}: {expected}: {cert_file}, {key_file}: {error}"]) from error


def _load_ca(context: ssl.SSLContext, flag: str, ca_file: str) -> None:
    try:
        context.load_verify_locations(cafile=ca_file)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{flag}: expected a file of PEM certificates: {ca_file}: {error}"]) from error
