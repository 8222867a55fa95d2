"""What the header of a checkpoint takes from its file."""

from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipExtFile, ZipFile

import pytest
import torch

from ldm.weights.header import read_header


def test_of_a_packed_record_only_the_values_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of a few kB was unpacked to gigabytes, of which the tensor has some bytes."""
    torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "plain")
    with ZipFile(tmp_path / "plain") as plain, ZipFile(tmp_path / "w", "w", ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            rest = bytes(3_000_000) if "/data/" in name else b""
            packed.writestr(name, plain.read(name) + rest)
    assert (tmp_path / "w").stat().st_size < 10_000
    header = read_header(tmp_path / "w")
    sizes = []
    read = ZipExtFile.read

    def counted(self: ZipExtFile, n: int = -1) -> bytes:
        sizes.append(n)
        return read(self, n)

    monkeypatch.setattr(ZipExtFile, "read", counted)
    assert header.map()["w"].tolist() == [1.0, 2.0]
    assert sizes == [8]
