"""Link: what the hosts of a group's ranks tell each other, and how they notice that one of them is gone.

A star of sockets with rank 0 in the middle. They are chosen over gloo because the death of a process closes them, so
that whoever waits knows at once and by name, because a wait can be interrupted, and because messages may be of any
size.

Every message carries an epoch. When a step fails on a rank, this tells the others and goes on in the next epoch; what
was sent in an earlier one is nobody's any more. Messages are pickled as they are: as a connection itself would, tensors
would travel through memory that only a process and its `multiprocessing` children share.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch.distributed as dist

from hf_paged.distributed.errors import Divergence, ParallelError, PeerFailed, PeerLost

SLICE_S = 0.1
"""How often a wait looks whether it is still wanted."""


class Link:
    """One rank's connections.

    Args:
        rank, size: this rank, and how many there are.
        connections: by rank: of all others where this is rank 0, else of rank 0.
        timeout_s: a rank that has not answered for so long counts as lost.
    """

    def __init__(self, rank: int, size: int, connections: dict[int, Connection], timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.epoch = 0
        self.broken: ParallelError | None = None
        """Why nothing can be exchanged any more."""
        self._connections = connections
        self.check: Callable[[], None] = lambda: None
        """Called now and then in a wait; may raise."""

    # ---- between all ranks -----------------------------------------------------------------------------------------

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, by rank. Every rank calls it, with the same `what`.

        Raises:
            PeerLost: a rank ended or does not answer.
            PeerFailed: a rank has told that it failed.
            Divergence: another rank is doing something else.
        """
        self._require()
        message = ("exchange", what, value)
        if self.rank:
            self._send(0, message)
            return self._expect(0, what)
        values = [value]
        for rank in range(1, self.size):
            values.append(self._expect(rank, what))
        for rank in range(1, self.size):
            self._send(rank, ("exchange", what, values))
        return values

    def agree(self, what: str, value: Any) -> None:
        """Raises Divergence on every rank unless all of them have the same value.

        A rank that has sent its value has given its word: others begin what is agreed without asking again, so it is
        not interrupted until it knows.
        """
        check = self.check
        if self.rank:
            self.check = lambda: None
        try:
            values = self.exchange(what, value)
        finally:
            self.check = check
        if any(other != values[0] for other in values):
            odd = [str(rank) for rank, other in enumerate(values) if other != values[0]]
            raise self._break(
                Divergence(
                    f"the ranks do not do the same: rank {', '.join(odd)} differs from rank 0 in {what}. Under "
                    "torchrun every rank must make the same calls with the same prompts and parameters, in the same "
                    "order and from one thread. Start all ranks anew."
                )
            )

    def fail(self, reason: str) -> None:
        """Tells that this rank let go of what all were doing; the next exchange starts afresh."""
        if self.broken is None:
            self._tell_all(("failed", f"rank {self.rank} failed: {reason}"))
            self.epoch += 1

    def give_up(self, reason: str) -> ParallelError:
        """Tells that nothing can go on any more, and returns the error that says so."""
        return self._break(PeerLost(f"rank {self.rank} cannot go on: {reason}"))

    # ---- from rank 0 to the others ---------------------------------------------------------------------------------

    def tell(self, call: str, argument: Any = None) -> None:
        """Rank 0: has all others do something, without waiting for it."""
        self._require()
        for rank in self._connections:
            self._send(rank, ("call", call, argument))

    def next_call(self) -> tuple[str, Any]:
        """Another rank: what rank 0 has it do next, whenever that comes.

        Raises:
            PeerLost: rank 0 ended.
        """
        while True:
            self._require()
            kind, *rest = self._receive(0, forever=True)
            if kind == "call":
                return rest[0], rest[1]
            raise self._break(Divergence(f"rank 0 expects rank {self.rank} in {rest[0]}, which it is not doing"))

    # ---- who is there ----------------------------------------------------------------------------------------------

    def gone(self) -> list[int]:
        """Ranks whose processes ended, as far as this rank is connected; nothing is waited for."""
        return [rank for rank, connection in self._connections.items() if _has_ended(connection)]

    def blame(self, error: BaseException) -> ParallelError:
        """After a collective failed: who is lost, as soon as it is known here."""
        deadline = time.monotonic() + min(5.0, self.timeout_s)
        while time.monotonic() < deadline and self.broken is None:
            if gone := self.gone():
                return self._break(_ended(gone[0]))
            with suppress(PeerFailed, PeerLost, Divergence):
                for rank, connection in self._connections.items():
                    if connection.poll(SLICE_S):
                        self._receive(rank)
        if self.broken is not None:
            return self.broken
        return self.give_up(f"what it computes with the other ranks failed ({type(error).__name__}: {error})")

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self.broken = self.broken or PeerLost("the group was closed")

    # ---- details ---------------------------------------------------------------------------------------------------

    def _require(self) -> None:
        if self.broken is not None:
            raise type(self.broken)(str(self.broken))

    def _send(self, rank: int, message: tuple[Any, ...]) -> None:
        try:
            self._connections[rank].send_bytes(pickle.dumps((self.epoch, *message)))
        except OSError as error:
            raise self._break(_ended(rank)) from error

    def _tell_all(self, message: tuple[Any, ...], but: int | None = None) -> None:
        for rank, connection in self._connections.items():
            if rank != but:
                with suppress(OSError):
                    connection.send_bytes(pickle.dumps((self.epoch, *message)))

    def _expect(self, rank: int, what: str) -> Any:
        kind, *rest = self._receive(rank)
        if kind != "exchange" or rest[0] != what:
            raise self._break(
                Divergence(f"the ranks do not do the same: rank {self.rank} is in {what}, rank {rank} in {rest[0]}")
            )
        return rest[1]

    def _receive(self, rank: int, forever: bool = False) -> tuple[Any, ...]:
        """The next message of this epoch from a rank."""
        connection, start = self._connections[rank], time.monotonic()
        while True:
            try:
                while not connection.poll(SLICE_S):
                    self.check()
                    if not forever and time.monotonic() - start > self.timeout_s:
                        raise self._break(
                            PeerLost(f"rank {rank} has not answered for {self.timeout_s:g} s: it hangs, or is gone")
                        )
                received = connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise self._break(_ended(rank)) from error
            epoch, *message = pickle.loads(received)
            if message[0] == "broken":
                raise self._break(message[1], but=rank)
            outdated = epoch < self.epoch
            if outdated and (message[0] != "call" or message[1] == "step"):  # what else rank 0 tells goes for any epoch
                continue
            if message[0] == "failed":
                self._tell_all(tuple(message), but=rank)
                self.epoch = epoch + 1
                if forever:
                    continue
                raise PeerFailed(message[1])
            return tuple(message)

    def _break(self, error: ParallelError, but: int | None = None) -> ParallelError:
        if self.broken is None:
            self.broken = error
            self._tell_all(("broken", error), but=but)
        return self.broken


def connect(rank: int, size: int, group: dist.ProcessGroup, timeout_s: float) -> Link:
    """Makes the connections; every rank of the group calls it.

    Args:
        group: of a backend that takes tensors on a CPU. Used once, to say where rank 0 listens.
    """
    first = dist.get_global_rank(group, 0)
    if rank == 0:
        host = _own_address() if _several_hosts() else "127.0.0.1"
        key = os.urandom(32)
        with Listener((host, 0), backlog=size, authkey=key) as listener:
            dist.broadcast_object_list([listener.address, key], src=first, group=group)
            accepted = [listener.accept() for _ in range(size - 1)]
        connections = {connection.recv(): connection for connection in accepted}
    else:
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, src=first, group=group)
        connection = Client(told[0], authkey=told[1])
        connection.send(rank)
        connections = {0: connection}
    for connection in connections.values():
        with socket.socket(fileno=os.dup(connection.fileno())) as own:
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Link(rank, size, dict(sorted(connections.items())), timeout_s)


def _several_hosts() -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) < dist.get_world_size()


def _own_address() -> str:
    """This host's, as the others reach it: the one from which it would speak to the host that all of them have met at.
    Its name may well stand for a loopback address."""
    meeting = os.environ.get("MASTER_ADDR")
    if meeting is None:
        return socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting, 9))  # nothing is sent
        return str(probe.getsockname()[0])


def _ended(rank: int) -> PeerLost:
    return PeerLost(f"rank {rank} ended: look for its own error, above or in its log, and start all ranks anew")


def _has_ended(connection: Connection) -> bool:
    """Whether the other side closed, and nothing that it sent is left to read."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as own:
            return own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
