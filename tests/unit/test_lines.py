"""Messages between a driver and rank 0: whole ones, whatever comes between."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tpcpu.ranks import _Lines

MESSAGES = [{"number": i, "text": "é\0\n" * size} for i, size in enumerate((0, 1, 5, 1000, 0, 40_000, 2))]


class Interrupted:
    """A connection whose reader is interrupted every second time: behind the call, before its result is anybody's."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.calls = connection, 0

    def recv_into(self, room: memoryview) -> int:
        self.calls += 1
        count = self._connection.recv_into(room)
        if count and self.calls % 2:
            raise KeyboardInterrupt
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("interrupts", [False, True])
def test_every_message_comes_whole_and_in_order(ends, interrupts):
    sender = _Lines(ends[0])
    connection: Any = Interrupted(ends[1]) if interrupts else ends[1]
    reader = _Lines(connection)

    def send() -> None:
        for message in MESSAGES:
            sender.send(message)
        sender.close()

    thread = threading.Thread(target=send)
    thread.start()
    got = []
    while True:
        try:
            message = reader.receive()
        except KeyboardInterrupt:
            continue
        if message is None:
            break
        got.append(message)
    thread.join()
    assert got == MESSAGES
    assert not interrupts or connection.calls > 10


def test_what_waits_is_seen(ends):
    sender, reader = _Lines(ends[0]), _Lines(ends[1])
    assert not reader.waiting()
    sender.send({"a": 1})
    sender.send({"a": 2})
    assert reader.waiting()
    assert reader.receive() == {"a": 1}
    assert reader.waiting()
    assert reader.receive() == {"a": 2}
    assert not reader.waiting()
    sender.close()
    assert reader.waiting()
    assert reader.receive() is None
