"""The sections of the YAML files of a training, merged, with overrides from the command line."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.training.config import TrainingConfig, training_config
from ldm.training.data.config import DataConfig, data_config
from ldm.training.files import writing
from ldm.weights.loading import read_section

NAMES = ("model", "data", "training", "sampling")
SOURCES = ("train", "validation")
FILTER = "data.filters."


@dataclass(frozen=True)
class Sections:
    model: dict[str, Any]
    data: DataConfig
    training: TrainingConfig


def read_sections(bases: Sequence[Path], overrides: Sequence[str]) -> Sections:
    """The sections of YAML files, the later over the earlier, and of `section.key=value` over all of them.

    InputError for what is missing, unknown (with the nearest that is known) or wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    files = [{name: read_section(base, name, {}) for name in NAMES} for base in bases]
    for override in overrides:
        name = override.partition("=")[0].partition(".")[0]
        if name not in NAMES or "." not in override.partition("=")[0]:
            nearest = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest and nearest[0] != name else ""
            raise InputError(f"{override}: an override is like training.steps=10 or data.size=64{hint}")
    try:
        last = OmegaConf.to_container(read_overrides(overrides))
        _drop_other_params([*files, last])
        merged = OmegaConf.to_container(OmegaConf.merge(*files, last))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise InputError(f"{' '.join(overrides)} cannot be read: {' '.join(str(error).split())}") from error
    for name in ("model", "data", "training"):
        if not merged.get(name):
            raise InputError(f"{bases[0]} has no {name}: section")
        if not isinstance(merged[name], Mapping):
            raise InputError(f"{name} is {merged[name]!r}, not a section of keys")
    if not isinstance(merged["model"].get("target"), str):
        raise InputError(f"the model: section of {bases[0]} has no target")
    for name, part in (("model", merged["model"]), *((f"data.{n}", merged["data"].get(n)) for n in SOURCES)):
        params = part.get("params") if isinstance(part, Mapping) else None
        if not isinstance(params, Mapping | None):
            raise InputError(f"{name}.params is {params!r}, not a mapping of parameters to values")
    return Sections(merged["model"], data_config(merged["data"]), training_config(merged["training"]))


def read_overrides(overrides: Iterable[str]) -> Any:
    """What `section.key=value` say, as a config of OmegaConf.

    Conditions such as data.filters.score=>= 5 are text, and no YAML. Errors are OmegaConf's and YAML's.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.create()
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith(FILTER):
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            filters = {key.removeprefix(FILTER): value[1:-1] if quoted else value}
            merged = OmegaConf.merge(merged, {"data": {"filters": filters}})
        else:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
    return merged


def _drop_other_params(files: Sequence[Mapping[str, Any]]) -> None:
    """Where a file names another source than those before it, their sources' params are none of its."""
    for name in SOURCES:
        data = [section for file in files if isinstance(section := file.get("data"), dict)]
        sources = [source for section in data if isinstance(source := section.get(name), dict)]
        target = None
        for number, source in enumerate(sources):
            if target not in (None, source.get("target", target)):
                for earlier in sources[:number]:
                    earlier.pop("params", None)
            target = source.get("target", target)


def output_folder(folder: Path, output: str | None) -> Path:
    """The folder of a run; it and that of `output` are made. InputError if they cannot be written."""
    with writing(f"--logdir {folder.parent}"):
        folder.mkdir(parents=True, exist_ok=True)
    if output:
        with writing(f"--output {output}"):  # hours before there is something to write
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            if Path(output).is_dir():
                raise IsADirectoryError("it is a folder")
    return folder
