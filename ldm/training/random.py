"""Random numbers of training: each belongs to one example of one step, whatever the number of devices.

Position `row` of the global batch of step n has generators of its own, seeded with (seed, n, row, purpose).
So a resumed run continues as if it had never stopped, and one process draws the same as several.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def row_generator(seed: int, step: int, row: int, purpose: str = "data") -> torch.Generator:
    """A CPU generator for one example of a step's global batch.

    Different purposes draw independent numbers, so that a new use leaves the others as they are.
    """
    text = f"{seed}/{step}/{row}/{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(seed: int, step: int, rows: Iterable[int], purpose: str) -> Tensor:
    """A number in 0 <= u < 1 for each row, float64 [b]."""
    return torch.tensor(
        [torch.rand((), generator=row_generator(seed, step, int(row), purpose)).item() for row in rows],
        dtype=torch.float64,
    )


def normal(seed: int, step: int, rows: Iterable[int], shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal numbers for each row, float32 [b, *shape]."""
    return torch.stack(
        [torch.randn(*shape, generator=row_generator(seed, step, int(row), purpose)) for row in rows]
    )
