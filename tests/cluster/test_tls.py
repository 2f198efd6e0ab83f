"""A cluster that uses TLS where this process does not, and the reverse; gRPC's server stands for Ray's."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from hsplit.cluster.tls import check_tls
from hsplit.errors import InputError
from tests.cluster.test_secure_transport import certificates

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return certificates(tmp_path_factory.mktemp("own"), HOST)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return certificates(tmp_path_factory.mktemp("others"), HOST)


@contextmanager
def serving(certificate: Mapping[str, str] | None) -> Iterator[int]:
    """A gRPC server that asks for certificates as Ray's do; gives its port."""
    server = grpc.server(ThreadPoolExecutor(1))
    if certificate is None:
        port = server.add_insecure_port(f"{HOST}:0")
    else:
        key, own, authority = (
            Path(certificate[f"RAY_TLS_{name}"]).read_bytes() for name in ("SERVER_KEY", "SERVER_CERT", "CA_CERT")
        )
        port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([(key, own)], authority, True))
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


def check(port: int, environ: Mapping[str, str]) -> None:
    with socket.create_connection((HOST, port)) as connection:
        check_tls("lab:6379", connection, 10.0, environ)


def refused(port: int, environ: Mapping[str, str]) -> str:
    with pytest.raises(InputError, match=r"^[^\n]*$") as refusal:
        check(port, environ)
    return str(refusal.value)


def test_both_with_it_or_both_without_is_all_right(own: dict[str, str]) -> None:
    with serving(own) as port:
        check(port, own)
    with serving(None) as port:
        check(port, {})
        check(port, {"RAY_USE_TLS": "0"})


def test_a_cluster_with_tls_and_a_driver_without(own: dict[str, str]) -> None:
    with serving(own) as port:
        assert refused(port, {}).startswith("--address lab:6379: this Ray cluster uses TLS: set RAY_USE_TLS=1 here, ")


def test_a_driver_with_tls_and_a_cluster_without(own: dict[str, str]) -> None:
    with serving(None) as port:
        assert "RAY_USE_TLS is set here, and this Ray cluster does not use TLS" in refused(port, own)


def test_certificates_of_another_authority(own: dict[str, str], others: dict[str, str]) -> None:
    with serving(own) as port:
        assert "the certificate there does not pass" in refused(port, others)
        # The authority is known, and our own certificate is not signed by it.
        mixed = others | {"RAY_TLS_CA_CERT": own["RAY_TLS_CA_CERT"]}
        assert f"this host's certificate, {others['RAY_TLS_SERVER_CERT']}, is refused there" in refused(port, mixed)


def test_files_that_are_missing_or_no_certificates(own: dict[str, str], tmp_path: Path) -> None:
    with serving(own) as port:
        assert refused(port, {"RAY_USE_TLS": "1"}).startswith("RAY_USE_TLS is set, and RAY_TLS_SERVER_CERT, ")
        gone = own | {"RAY_TLS_SERVER_KEY": str(tmp_path / "none")}
        assert refused(port, gone) == f"RAY_TLS_SERVER_KEY: {tmp_path / 'none'} cannot be read"
        (text := tmp_path / "text").write_text("no certificate\n")
        assert "must be a PEM certificate" in refused(port, own | {"RAY_TLS_SERVER_CERT": str(text)})


def test_the_certificate_names_the_hosts_address(own: dict[str, str]) -> None:
    shown = subprocess.run(
        ["openssl", "x509", "-in", own["RAY_TLS_SERVER_CERT"], "-noout", "-ext", "subjectAltName"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"IP Address:{HOST}" in shown.stdout
