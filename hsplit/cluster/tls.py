"""TLS between this process and a Ray cluster: whether both use it, with certificates that fit.

Where they do not, Ray itself tries for minutes, and then names no cause.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping

from hsplit.errors import InputError

_USE = "RAY_USE_TLS"
_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_HTTP_2 = ["h2"]


def check_tls(
    address: str, connection: socket.socket, timeout_s: float, environ: Mapping[str, str] = os.environ
) -> None:
    """Refuse a cluster that uses TLS where this process does not, the reverse, and certificates that do not fit.

    Args:
        address: the cluster's, for the message.
        connection: to it; it is used up.
        timeout_s: longest wait for an answer.
        environ: has Ray's settings.

    Raises:
        InputError: says what to set.
    """
    connection.settimeout(timeout_s)
    used = environ.get(_USE, "0").lower() in ("1", "true")
    context = _own_context(environ) if used else _any_context()
    spoken = accepted = False
    try:
        with context.wrap_socket(connection, server_hostname=connection.getpeername()[0]) as secure:
            spoken = True
            # A certificate of ours that is refused shows only now: a server that accepts it speaks first.
            accepted = bool(used and secure.recv(1))
    except ssl.SSLCertVerificationError as error:
        why = f"the certificate there does not pass {environ[_FILES[2]]} ({error.verify_message})"
        raise InputError(
            f"--address {address}: {why}: this authority must have signed it, for the address of its host"
        ) from error
    except OSError:  # SSL's errors, a closed connection, no answer in time
        pass
    if used and not spoken:
        raise InputError(
            f"--address {address}: {_USE} is set here, and this Ray cluster does not use TLS: unset it here, or set it"
            " there"
        )
    if used and not accepted:
        raise InputError(
            f"--address {address}: this host's certificate, {environ[_FILES[0]]}, is refused there: the cluster's"
            " authority must have signed it"
        )
    if spoken and not used:
        raise InputError(
            f"--address {address}: this Ray cluster uses TLS: set {_USE}=1 here, and {', '.join(_FILES)} to this host's"
            " certificate, its key, and the authority's certificate"
        )


def _any_context() -> ssl.SSLContext:
    """Return a context to find out whether TLS is spoken at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(_HTTP_2)
    return context


def _own_context(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Return a context with the files that Ray is to use.

    Raises:
        InputError: one is not named, or cannot be used.
    """
    if missing := [name for name in _FILES if not environ.get(name)]:
        raise InputError(f"{_USE} is set, and {', '.join(missing)} not: name the files, or unset {_USE}")
    certificate, key, authority = (environ[name] for name in _FILES)
    for name in _FILES:
        if not os.access(environ[name], os.R_OK):
            raise InputError(f"{name}: {environ[name]} cannot be read")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(_HTTP_2)
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise InputError(
            f"{', '.join(_FILES)}: {error.reason or error}: must be a PEM certificate, its key, and the authority's"
            " certificate"
        ) from error
    return context
