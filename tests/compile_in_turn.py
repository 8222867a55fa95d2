"""What another process imports, by a name of its own: other packages bring a package named `tests`, too."""

from pathlib import Path

from ldm.optimize.compile import first_compiles


def compile_in(folder: Path) -> None:
    """Compile in turn: `reported` has what is said of waiting, `compiled` is there once it was its turn."""
    with first_compiles("UNet", "key", (folder / "reported").write_text):
        (folder / "compiled").touch()
