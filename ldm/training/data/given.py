"""A set of images as a command names it: a folder, shards, a table, or the YAML file of a training."""

from pathlib import Path

from ldm.errors import InputError
from ldm.training.data.example import Source
from ldm.training.data.sources import open_sources

YAML = (".yaml", ".yml")


def given_source(option: str, given: str) -> Source:
    """The images of a folder, captioned or not, of .tar shards (also "train-{000..099}.tar"), of .parquet
    files, or those that a training YAML trains on. InputError, naming the `option`, for anything else.
    """
    path = Path(given)
    try:
        if path.suffix in YAML:
            from ldm.training.data.config import data_config
            from ldm.weights.loading import read_section

            return open_sources(data_config(read_section(path, "data")))[0]
        inside = {file.suffix for file in path.iterdir()} if path.is_dir() else {path.suffix}
        if ".tar" in inside:
            from ldm.training.data.shards import WebDataset

            return WebDataset(given)
        if ".parquet" in inside:
            from ldm.training.data.table import Parquet

            return Parquet(given)
        if path.is_dir():
            from ldm.training.data.folder import ImageFolder

            return ImageFolder(given, caption="")
    except (InputError, OSError) as error:
        raise InputError(f"{option} {given}: {error}") from error
    what = "a folder, .tar shards, .parquet files or a training .yaml"
    raise InputError(f"{option} {given}: there is no such thing; give {what}")
