"""A bad network on loopback: a TCP proxy that drops, stalls or slows what goes through it.

    with Proxy(sshd.host, sshd.port) as proxy:
        proxy.fault = Fault("drop", "down", after=20_000)
        ...  # connect to proxy.host, proxy.port
        proxy.reset()

It counts the bytes of each direction over all connections since the last `reset()`, so that one
point of a whole run can be named: "after 20,000 bytes from the server". No pytest in here: scripts
use this module too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

HOST = "127.0.0.1"
UP, DOWN = "up", "down"  # from the client to the server, and back
DIRECTIONS = (UP, DOWN)
KINDS = ("drop", "stall", "slow")
PIECE = 1 << 15


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens once `after` bytes have gone in `direction`.

    drop: both sides see the connection reset. stall: nothing moves in that direction any more, and
    nobody is told. slow: `rate` bytes a second from then on, for `seconds`.
    With `lasting` every later connection meets the same: a drop closes it at once, a stall says
    nothing from its first byte on.
    """

    kind: str
    direction: str
    after: int
    lasting: bool = False
    rate: int = 20_000
    seconds: float = 3.0


class Proxy:
    """Listens on a port of its own and passes everything on to `host`:`port`.

    passed: bytes so far in each direction
    struck: whether the fault has happened
    on_bytes: called with the direction after each piece that was passed on
    """

    host = HOST

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._listener = socket.create_server((HOST, 0), backlog=50)
        self.port: int = self._listener.getsockname()[1]
        self.fault: Fault | None = None
        self.on_bytes: Callable[[str], None] | None = None
        self.passed = dict.fromkeys(DIRECTIONS, 0)
        self.struck = False
        self._slow_until = 0.0
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reset(self) -> None:
        """Cut what is connected, forget the fault, count from 0."""
        self.fault = self.on_bytes = None
        for link in self._linked():
            link.cut()
        with self._lock:
            self.passed = dict.fromkeys(DIRECTIONS, 0)
            self.struck, self._slow_until = False, 0.0

    def close(self) -> None:
        with contextlib.suppress(OSError):  # wakes accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _linked(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                fault = self.fault
                if fault and fault.lasting and self.struck and fault.kind == "drop":
                    _reset(client)
                    continue
                try:
                    server = socket.create_connection(self._target, timeout=10)
                except OSError:
                    _reset(client)
                    continue
                server.settimeout(None)
                link = _Link(self, client, server)
                with self._lock:
                    self._links.add(link)
                link.start()

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _silent(self, direction: str) -> bool:
        fault = self.fault
        stalled = fault is not None and fault.kind == "stall" and fault.direction == direction
        return stalled and fault.lasting and self.struck

    def _allowed(self, direction: str, size: int) -> tuple[int, str]:
        """How many of `size` bytes may pass now, and what happens after them: a kind or ''."""
        fault = self.fault
        with self._lock:
            count = self.passed[direction]
            if fault is None or fault.direction != direction or count + size <= fault.after:
                self.passed[direction] += size
                return size, ""
            if self.struck and not fault.lasting and fault.kind != "slow":
                self.passed[direction] += size
                return size, ""
            if fault.kind == "slow":
                self._slow_until = self._slow_until or time.monotonic() + fault.seconds
                self.passed[direction] += size
                slow = time.monotonic() < self._slow_until
                self.struck = True
                return size, "slow" if slow else ""
            allowed = max(0, fault.after - count)
            self.passed[direction] += allowed
            self.struck = True
            return allowed, fault.kind


class _Link:
    """One connection through the proxy: a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._gone = threading.Event()
        self._ends = 0

    def start(self) -> None:
        ways = ((UP, self._client, self._server), (DOWN, self._server, self._client))
        for way in ways:
            threading.Thread(target=self._pump, args=way, daemon=True, name="proxy").start()

    def cut(self) -> None:
        """Both sides see a reset, as from a router that has forgotten the connection."""
        self._gone.set()
        for side in (self._client, self._server):
            _reset(side)
        self._proxy._forget(self)

    def _pump(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                allowed, then = self._proxy._allowed(direction, len(piece))
                self._pass(direction, target, piece[:allowed], slowly=then == "slow")
                if then == "drop":
                    self.cut()
                    return
                if then == "stall":
                    self._stand_still()
                    return
            if self._proxy._silent(direction):  # nobody learns that the other side hung up
                self._stand_still()
                return
            self._ends += 1
            target.shutdown(socket.SHUT_WR)  # the other direction may still have something to say
            if self._ends < 2:
                return
        if self._ends < 2:
            self.cut()
            return
        self._client.close()
        self._server.close()
        self._proxy._forget(self)

    def _pass(self, direction: str, target: socket.socket, piece: bytes, *, slowly: bool) -> None:
        fault = self._proxy.fault
        step = max(1, fault.rate // 20) if slowly and fault else len(piece)
        for begin in range(0, len(piece), step or 1):
            target.sendall(piece[begin : begin + step])
            if slowly and self._gone.wait(0.05):
                return
        if called := self._proxy.on_bytes:
            called(direction)

    def _stand_still(self) -> None:
        """Read nothing more, so that the sender's buffers fill up; until the client is gone."""
        watch = select.poll()
        try:
            watch.register(self._client, select.POLLRDHUP)
        except ValueError:  # the other direction has closed it
            return
        while not self._gone.is_set():
            if watch.poll(200):
                self.cut()


def _reset(side: socket.socket) -> None:
    """Close with a reset instead of a farewell; a thread that reads from it wakes up."""
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RD)
    side.close()
