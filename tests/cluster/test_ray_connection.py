"""An address where no Ray is: one line at once, before Ray tries it."""

from __future__ import annotations

import socket
from unittest.mock import Mock

import pytest

from hsplit.cluster.connection import connect
from hsplit.errors import InputError


def _closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch) -> Mock:
    init = Mock(return_value=Mock(dashboard_url=""))
    monkeypatch.setattr("ray.init", init)
    return init


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_nothing_listens(init: Mock, host: str) -> None:
    address = f"{host}:{_closed_port()}"
    with pytest.raises(InputError) as refused:
        connect(address, 1)
    message = str(refused.value)
    assert message.startswith(f"--address {address}: nothing answers there (") and "\n" not in message
    assert not init.called


def test_no_port_is_so_large(init: Mock) -> None:
    with pytest.raises(InputError, match="nothing answers there"):
        connect("127.0.0.1:70000", 1)


def test_whatever_listens_and_other_kinds_of_addresses_are_for_ray_to_try(init: Mock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for address in (f"127.0.0.1:{listening.getsockname()[1]}", "auto", "ray://nowhere:10001"):
            connect(address, 1)
            assert init.call_args.kwargs["address"] == address
