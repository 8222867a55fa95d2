"""EXIF data of image files for tests."""

import struct


def damaged_exif() -> bytes:
    """EXIF data that Pillow cannot write anew: orientation 6 and, where a text belongs, a fraction."""
    entries = struct.pack(">HHII", 0x010E, 5, 1, 38) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    head = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2)
    return head + entries + bytes(4) + struct.pack(">II", 1, 2)
