"""How an optimisation reaches one object without touching its class."""

from collections.abc import Callable
from typing import Any

Undo = Callable[[], None]


def override(owner: Any, name: str, value: Any) -> Undo:
    """Give one object its own attribute `name`; the result gives back what it had before.

    Several overrides of one attribute are undone in reverse order.
    """
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return undo


def undo_all(steps: list[Undo]) -> Undo:
    """One undo for several steps, the last first."""

    def undo() -> None:
        while steps:
            steps.pop()()

    return undo
