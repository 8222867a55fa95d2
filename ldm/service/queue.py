"""The waiting requests: bounded, and fair between clients. No threads here; the engine has the lock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


def _never(waiting: Waiting) -> bool:
    return False


# How many times the places that are left a client may fill by itself. Source of the rule: Choudhury and Hahne
# 1998, Dynamic queue length thresholds for shared-memory packet switches, https://doi.org/10.1109/90.664262
ALPHA = 8


class Full(Exception):
    """There is no room for so many; `excess` is how many would have to leave before."""

    def __init__(self, excess: int):
        super().__init__(f"{excess} too many")
        self.excess = excess


@dataclass(frozen=True)
class Waiting(Generic[T]):
    """A request that waits. Those with equal keys can be sampled together; a job's are of one client."""

    client: str
    job: Hashable
    key: Hashable
    entry: T


class FairQueue(Generic[T]):
    """Requests wait here, at most `size`. Clients take turns, whatever each of them has put in.

    A client may fill at most `ALPHA` times the places that this leaves free: a queue of 64 always has some
    places for whoever comes next.
    """

    def __init__(self, size: int):
        self.size = size
        self._clients: OrderedDict[str, deque[Waiting[T]]] = OrderedDict()  # whose turn it is comes first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Waiting[T]]:
        """Each client's requests, oldest first, in the order in which clients have their turns."""
        return (one for own in self._clients.values() for one in own)

    def put(self, waiting: Sequence[Waiting[T]]) -> None:
        """Add the requests of a job, all or none. `Full` if there is no room."""
        self.check(waiting[0].client, len(waiting))
        self._clients.setdefault(waiting[0].client, deque()).extend(waiting)

    def check(self, client: str, count: int) -> None:
        """`Full` if a client could not add so many."""
        own = len(self._clients.get(client, ()))
        left = self.size - len(self) - count
        if left < 0:
            raise Full(-left)
        if own and own + count > ALPHA * (left + 1):
            raise Full(count)

    def first(self, gives_way: Callable[[Waiting[T]], bool] = _never) -> Waiting[T] | None:
        """The request that leads the next batch: the oldest one of the client whose turn it is.

        Requests that give way are passed over, and keep their places, as long as there are others.
        """
        return next((one for one in self if not gives_way(one)), next(iter(self), None))

    def take(self, most: int, first: Waiting[T] | None = None) -> list[Waiting[T]]:
        """At most so many requests that can be sampled together; none if none wait.

        `first` leads, with what its job has of the same key, or whoever is first by turns; if it does not
        wait any more, nothing is taken. What is left of the batch goes to requests with the same key, one of
        each client in turn; for that no client loses its turn.
        """
        first = first or self.first()
        if first is None or not any(one is first for one in self._clients.get(first.client, ())):
            return []
        taken = self._remove(first.client, lambda one: (one.job, one.key) == (first.job, first.key), most)
        while len(taken) < most:
            found: list[Waiting[T]] = []
            for client in [*self._clients]:
                if len(taken) + len(found) < most:
                    found += self._remove(client, lambda one: one.key == first.key, 1)
            if not found:
                break
            taken += found
        if first.client in self._clients:
            self._clients.move_to_end(first.client)
        return taken

    def discard(self, job: Hashable) -> int:
        """Remove a job's requests; returns how many there were."""
        clients = [*self._clients]
        return sum(len(self._remove(client, lambda one: one.job == job, self.size)) for client in clients)

    def ahead(self, job: Hashable) -> int:
        """About how many requests leave before a job's first one: those of its client, and of each other
        client as many, and one more.
        """
        for client, own in self._clients.items():
            before = next((k for k, one in enumerate(own) if one.job == job), None)
            if before is not None:
                others = (len(each) for name, each in self._clients.items() if name != client)
                return before + sum(min(count, before + 1) for count in others)
        return 0

    def _remove(self, client: str, fits: Callable[[Waiting[T]], bool], most: int) -> list[Waiting[T]]:
        """Take a client's oldest requests that fit, at most so many."""
        taken, rest = [], deque()
        for one in self._clients[client]:
            (taken if len(taken) < most and fits(one) else rest).append(one)
        self._clients[client] = rest
        if not rest:
            del self._clients[client]
        return taken
