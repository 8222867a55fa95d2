"""Small sets of captioned images, as folders, shards and tables."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.training.data.example import Example, InMemory


def image(number: int, width: int = 32, height: int = 32) -> np.ndarray:
    """An image uint8 [height, width, 3] that shows its number: the first pixel is (number, 0, 200)."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    pixels[:4, :4] = number, 0, 200
    return pixels


def encoded(number: int, width: int = 32, height: int = 32, form: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(number, width, height)).save(buffer, form)
    return buffer.getvalue()


def write_folder(folder: Path, count: int, width: int = 32, height: int = 32) -> Path:
    """`count` images k.png with the captions "image k" beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(encoded(number, width, height))
        (folder / f"{number:02}.txt").write_text(f"image {number}")
    return folder


def write_shard(path: Path, members: Mapping[str, bytes | str | dict[str, Any]]) -> Path:
    """A tar file; values that are no bytes are written as text or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, value in members.items():
            data = json.dumps(value) if isinstance(value, dict) else value
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def in_memory(sizes: Sequence[tuple[int, int]], **metadata: Sequence[Any]) -> InMemory:
    """Images of the widths and heights, with the captions "image 0", …"""
    examples = [Example(f"{k}", image(k, *size), f"image {k}") for k, size in enumerate(sizes)]
    return InMemory(examples, metadata)
