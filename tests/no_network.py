"""A network that counts who asks for it, and answers nobody."""

import socket

import pytest


class Network:
    """Counts the requests that would have gone out."""

    def __init__(self):
        self.requests = []

    def refuse(self, *address, **options):
        self.requests.append(address)
        raise OSError(f"no network in tests: {address}")


@pytest.fixture
def network(monkeypatch):
    counted = Network()
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, counted.refuse)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, counted.refuse)
    return counted
