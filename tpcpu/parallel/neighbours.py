"""The witnesses of a job's other hosts, over TCP: that they are alive, and what they have seen.

Knows sockets and lines of JSON; must not know processes, nor what is to be done about a fault. Every two witnesses
have one connection; the one of the later host calls. Each shows the other that it knows the job's secret, which itself
does not travel; what is said then is open.
"""

import contextlib
import fcntl
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]

_DIAL_SECONDS = 2.0
_SIOCGIFADDR = 0x8915
_LONGEST = 1 << 16


def addresses(name: str) -> list[str]:
    """Where other hosts may reach this one: its name, then what its interfaces are called, without loopback."""
    found = [name]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, interface in socket.if_nameindex():
            if interface == "lo":
                continue
            with contextlib.suppress(OSError):
                request = struct.pack("256s", interface.encode())
                found.append(socket.inet_ntoa(fcntl.ioctl(asked, _SIOCGIFADDR, request)[20:24]))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as lines:
        for line in lines:
            digits, _, _, scope, _, _ = line.split()
            if scope == "00":
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def listen() -> socket.socket:
    """At a free port, for both versions of IP where the host has them."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    return socket.create_server(("", 0), backlog=64)


class Neighbour:
    """The witness of another host."""

    def __init__(self, host: int, name: str, ranks: list[int], offer: Message) -> None:
        self.host, self.name, self.ranks, self.offer = host, name, ranks, offer
        self.connection: socket.socket | None = None
        self.heard = 0.0
        """When it was heard of last;"""
        self.ahead = float("inf")
        """how much later our clock is than its, its messages' way included;"""
        self.has_left = False
        """and whether it needs no watching any more: its ranks have all left the job."""
        self.news: Message = {}
        """What it said last of its ranks."""
        self._received = b""

    @property
    def title(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"host {self.name} (rank{'s' if len(self.ranks) > 1 else ''} {ranks})"

    def send(self, message: Message) -> None:
        """Nothing is waited for: what does not go out is late already."""
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.send(json.dumps({**message, "clock": time.monotonic()}).encode() + b"\n")

    def receive(self) -> Iterator[Message | None]:
        """What has come; None where the other side has closed."""
        assert self.connection is not None
        try:
            data = self.connection.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.heard = now
            self.ahead = min(self.ahead, now - message["clock"])
            yield message
        if not data:
            yield None


class Neighbours:
    """All of them, seen from host `host`."""

    def __init__(
        self, host: int, secret: str, listener: socket.socket, others: list[Neighbour],
        selector: selectors.BaseSelector, told: Callable[[Neighbour, Message | None], None],
    ) -> None:  # fmt: skip
        """`told` is called with what a neighbour says, None when it is gone."""
        self.others = {each.host: each for each in others}
        self._host, self._secret, self._selector, self._told = host, secret, selector, told
        self._met: list[tuple[int, socket.socket]] = []
        # connections are made beside the loop, which they wake
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        selector.register(self._woken, selectors.EVENT_READ, self._adopt)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        for each in others:
            if each.host < host:
                threading.Thread(target=self._dial, args=(each,), daemon=True).start()

    def send(self, message: Message) -> None:
        """To all that can be reached."""
        for each in self.others.values():
            each.send(message)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            connection.settimeout(_DIAL_SECONDS)
            question = secrets.token_hex(16)
            _say(connection, {"question": question})
            caller = _line(connection)
            if self._knows_secret(caller, question) and caller["host"] in self.others:
                _say(connection, {"host": self._host, "answer": self._answer(caller["question"], self._host)})
                self._introduce(int(caller["host"]), connection)
                return
        connection.close()

    def _dial(self, other: Neighbour) -> None:
        for address in other.offer["addresses"]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                connection = socket.create_connection((address, other.offer["port"]), _DIAL_SECONDS)
                question = secrets.token_hex(16)
                answer = self._answer(_line(connection)["question"], self._host)
                _say(connection, {"host": self._host, "answer": answer, "question": question})
                called = _line(connection)
                if self._knows_secret(called, question) and called["host"] == other.host:
                    self._introduce(other.host, connection)
                    return
                connection.close()

    def _answer(self, question: str, host: int) -> str:
        """What only who knows the secret can say, and a host only of itself."""
        return hmac.digest(self._secret.encode(), f"{question} {host}".encode(), "sha256").hex()

    def _knows_secret(self, message: Message, question: str) -> bool:
        return hmac.compare_digest(str(message["answer"]), self._answer(question, message["host"]))

    def _introduce(self, host: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._met.append((host, connection))
        os.write(self._wake, b".")

    def _adopt(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        while self._met:
            host, connection = self._met.pop()
            other = self.others[host]
            if other.connection is not None:
                connection.close()
                continue
            other.connection, other.heard = connection, time.monotonic()
            self._selector.register(connection, selectors.EVENT_READ, lambda each=other: self._hear(each))

    def _hear(self, other: Neighbour) -> None:
        for message in other.receive():
            if message is None:
                assert other.connection is not None
                self._selector.unregister(other.connection)
                other.connection.close()
                other.connection = None
            self._told(other, message)


def _say(connection: socket.socket, message: Message) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _line(connection: socket.socket) -> Message:
    """The first line that comes, byte by byte: what follows it is for others to read."""
    received = b""
    while not received.endswith(b"\n") and len(received) < _LONGEST:
        byte = connection.recv(1)
        if not byte:
            raise ValueError("closed")
        received += byte
    message: Message = json.loads(received)
    return message
