"""Stand-in weights of the full models: made once, kept in the folder `--cache`, with nothing to download."""

import argparse
import os
import sys
from pathlib import Path

from measuring import in_fresh_process
from peers import read_through

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.loading import ROOT, V1_CONFIG


def v1_weights(options: argparse.Namespace) -> Path:
    return stand_in_weights(ROOT / V1_CONFIG, options.cache / "v1-float32.safetensors")


def stand_in_weights(config: Path, path: Path) -> Path:
    """`path`: the config's model as float32 safetensors, made if need be, and now in the page cache."""
    if not path.exists():
        notice(f"making stand-in weights, once: {path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            in_fresh_process(write_weights, config, path)
        except OSError as error:
            raise InputError(f"--cache {path.parent}: {error.strerror}") from error
    read_through(path)
    return path


def write_weights(config: Path, path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests/golden"))
    import torch
    from pseudo_weights import pseudo_state_dict
    from safetensors.torch import save_file

    from ldm.util import instantiate_from_config
    from ldm.weights.loading import read_config

    with torch.device("meta"):
        wanted = instantiate_from_config(read_config(config)).state_dict()
    state = pseudo_state_dict({name: ["float32", list(tensor.shape)] for name, tensor in wanted.items()})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save_file(state, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
