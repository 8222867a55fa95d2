"""The files that the page offers by name: LoRAs, textual inversions and ControlNets in given folders."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import FieldError, InputError
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.adapters import SUFFIXES
from ldm.pipeline.settings.control import WEIGHT_FILES, Control
from ldm.webui.command import LORA_FOLDER, near
from ldm.weights.files import files_below
from ldm.weights.loading import find

EMBEDDINGS = (".pt", ".bin", ".safetensors")
BUNDLED_LORAS = ("models/loras/few-steps.safetensors",)
BUNDLED_CONTROLS = ("models/scenes-128-canny/model.safetensors", "models/scenes-64-canny/model.safetensors")


@dataclass(frozen=True)
class Files:
    """Paths by the names that the page shows. Nothing else on the machine can be named."""

    loras: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def found(
        cls,
        lora_folder: str | None = None,
        embedding_folder: str | None = None,
        control_folder: str | None = None,
    ) -> Files:
        """What lies in the folders, of LoRAs also below them, beside what came with this repository.

        InputError for a folder that is given and is none.
        """
        suffixes = [f".{one}" for one in SUFFIXES]
        return cls(
            {path.name: near(path) for path in bundled(BUNDLED_LORAS)}
            | _inside("lora_folder", lora_folder, suffixes, LORA_FOLDER, below=True),
            _inside("embedding_folder", embedding_folder, EMBEDDINGS),
            {path.parent.name: near(path) for path in bundled(BUNDLED_CONTROLS)}
            | _inside("control_folder", control_folder, WEIGHT_FILES),
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """Those of all files."""
        return (*self.loras.values(), *self.embeddings.values(), *self.controls.values())

    def lora_texts(self, names: Sequence[str], weights: str) -> tuple[str, ...]:
        """`FILE:WEIGHT` for each LoRA; `weights` are numbers between commas, one for all or one for each.

        InputError for an unknown name or another number of weights.
        """
        paths = [path_of("LoRA", name, self.loras) for name in names]
        given = [word.strip() for word in weights.split(",") if word.strip()] or ["1"]
        if len(given) not in (1, len(paths)) and paths:
            raise InputError(f"LoRA weights: {len(given)} for {len(paths)} LoRAs; give one for all or each")
        given = given * len(paths) if len(given) == 1 else given
        return tuple(f"{path}:{weight}" for path, weight in zip(paths, given, strict=False))

    def embedding_texts(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(path_of("textual inversion", name, self.embeddings) for name in names)

    def control(self, name: str, image: object, weight: float, start: float, end: float) -> Control:
        return Control(path_of("ControlNet", name, self.controls), image, weight, start, end)

    def check(self, request: ImageRequest) -> None:
        """InputError for a LoRA that the prompt names and that is not among these: it may not be a path."""
        known = {
            spelling.casefold()
            for name in map(Path, self.loras)
            for spelling in (str(name), str(name.with_suffix("")), name.name, name.stem)
        }
        for lora in request.loras:
            if lora.file not in self.loras.values() and lora.file.casefold() not in known:
                path_of("LoRA", lora.file, self.loras)


def bundled(files: Iterable[str]) -> list[Path]:
    """Those of the repository's files that are there."""
    return [path for path in map(find, files) if path.exists()]


def path_of(what: str, name: str, known: Mapping[str, str]) -> str:
    """The path of a file by its name. InputError if there is none, which names those that there are."""
    if name not in known:
        there = f"there are {', '.join(known)}" if known else "there is none"
        raise InputError(f"no {what} {name!r}: {there}")
    return known[name]


def _inside(
    option: str,
    given: str | None,
    suffixes: Collection[str],
    default: str | None = None,
    below: bool = False,
) -> dict[str, str]:
    """The files with one of these suffixes in the folder that an option gives or, if it is there, in the
    default one, by their paths from there; with `below` those in its folders, too.
    """
    folder = given or default
    if folder is None:
        return {}
    there = find(folder)
    if not there.is_dir():
        if given:
            raise FieldError("{" + option + "} {folder} is no folder", folder=folder)
        return {}
    try:
        paths = files_below(there) if below else there.iterdir()
        found = sorted(path for path in paths if path.is_file() and path.suffix.lower() in suffixes)
    except OSError as error:
        why = f"it cannot be read: {error.strerror}"
        raise FieldError("{" + option + "} {folder}: {why}", folder=folder, why=why) from error
    return {str(path.relative_to(there)): near(path) for path in found}
