"""Small images, and PNG files with any chunks, well-formed or not."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(path: Path, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG file with these chunks after its pixels."""
    file = io.BytesIO()
    Image.fromarray(noise()).save(file, "PNG")
    head, end = file.getvalue()[:-12], file.getvalue()[-12:]
    for kind, data in chunks:
        head += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(head + end)
    return path
