"""An image file as the request that makes it again, and the pipeline for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ldm.cli import parser as parsers
from ldm.cli.arguments import Arguments, gather
from ldm.cli.like import texts_of
from ldm.errors import InputError
from ldm.pipeline.infotext import read_metadata
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest
from ldm.pipeline.settings.control import parse_control
from ldm.pipeline.settings.passes import LANCZOS, LATENT
from ldm.pipeline.settings.text import EmbeddingFile
from ldm.weights.description import describe
from ldm.weights.families import FAMILIES
from ldm.weights.hashes import same_model
from ldm.weights.loading import ModelFiles, choose_model, find, read_config

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

FILES = (*IMAGE_SETTINGS, "vae", "hires_upscaler")  # settings that name a file
MADE = {  # in messages; from all others
    "vae": "with the autoencoder",
    "hires_upscaler": "with the upscaler",
    "embedding": "with the textual inversion",
    "control": "with the ControlNet",
}
PARSERS = {
    "text": parsers.txt2img_parser,
    "init": parsers.img2img_parser,
    "inpaint": parsers.inpaint_parser,
    "depth": parsers.depth2img_parser,
    "upscale": parsers.upscale_parser,
}


class CannotRepeat(InputError):
    """An image that cannot be made again from what its file says and what is there."""


class Again:
    """The commands that make images again; the pipeline of the last one is kept.

    `given` are options that the user chose, over which the images have no say: the model's and how it
    computes. Files that an image's settings name, or its prompt, are looked for in `folders`, beside the
    image, in the folder above it and in the working folder.
    """

    def __init__(self, given: Mapping[str, Any], folders: Sequence[str] = ()):
        self.given, self.folders = dict(given), [Path(folder) for folder in folders]
        self._kept: tuple[Any, Pipeline | None] = None, None

    def recorded(self, file: str) -> dict[str, Any]:
        """An image's own settings. CannotRepeat if it has none."""
        settings = read_metadata(file)
        if settings is None:
            raise CannotRepeat("it carries no settings of this project")
        if settings.get("seed") is None or settings.get("prompt") is None:
            raise CannotRepeat("its settings lack the seed or the prompt")
        if settings.get("upscaler"):
            raise CannotRepeat("a pixel upscaler made it")
        return settings

    def command(self, file: str, recorded: Mapping[str, Any]) -> Arguments:
        """The command that makes it again. InputError for one that cannot be made alone, or here."""
        files = self.model_files(recorded)
        task = describe(read_config(files.config)).task
        parser = PARSERS[_kind(recorded, task)]()
        given = {
            "like": file,
            "safety": "off",
            "ckpt": str(files.weights),
            **self._named_files(file, recorded),
        }
        if recorded.get("nsfw_content_detected") is not None:
            given["safety"] = "auto"
        return gather(parser, given | self.given)

    def model_files(self, recorded: Mapping[str, Any]) -> ModelFiles:
        """The files of the model that made an image. CannotRepeat if they are not known."""
        wanted, name = str(recorded.get("model_hash") or ""), recorded.get("checkpoint") or "another model"
        if self.given.get("ckpt") or self.given.get("config"):
            files = choose_model(self.given.get("config"), self.given.get("ckpt"), None)
            if wanted and same_model(wanted, files.weights) is False:
                raise CannotRepeat(f"{name} ({wanted}) made it, and not {files.weights.name}")
            return files
        bundled = [find(family.bundled) for family in FAMILIES if family.bundled]
        for path in bundled:
            if wanted and path.exists() and same_model(wanted, path):
                return choose_model(None, str(path), None)
        linked = choose_model(None, None, None)
        if wanted and linked.weights.exists() and same_model(wanted, linked.weights):
            return linked
        raise CannotRepeat(f"{name} ({wanted or 'of unknown hash'}) made it; give that as --ckpt")

    def request(self, command: Arguments, recorded: Mapping[str, Any]) -> ImageRequest:
        return command.variant({"seed": recorded["seed"]})

    def pipeline(self, command: Arguments) -> Pipeline:
        """The pipeline of a command; the one of the command before, if they have the same.

        CannotRepeat for a LoRA that is nowhere.
        """
        key = (command.files, command.weights, command.given.get("vae"), command.runtime, command.run.safety)
        if self._kept[0] != key:
            self._kept = None, None  # its memory is free before the next one is loaded
            self._kept = key, command.pipeline()
        pipeline = self._kept[1]
        pipeline.adapters.look_in(self._searched(command.given["like"]))
        for one in command.request.loras:
            try:
                pipeline.adapters.find(one.file)
            except InputError as error:
                words = parsers.in_flags(error)
                raise CannotRepeat(f"{words}; or give the LoRA's folder as --folder DIR") from error
        return pipeline

    def _named_files(self, file: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that name files, with the paths where those are; LoRAs are found by the pipeline.

        CannotRepeat for a file that is nowhere.
        """
        found: dict[str, Any] = {}
        for name in FILES:
            if recorded.get(name) and name not in self.given and recorded[name] not in (LATENT, LANCZOS):
                found[name] = self._path(file, str(recorded[name]), name)
        if embeddings := texts_of(recorded.get("embedding")):
            named = [EmbeddingFile.parse(text) for text in embeddings]
            paths = [self._path(file, one.path, "embedding") for one in named]
            found["embedding"] = tuple(
                f"{path}:{one.name}" if one.name else path for path, one in zip(paths, named, strict=True)
            )
        if controls := texts_of(recorded.get("control")):
            nets = list(map(parse_control, controls))
            weights = [self._path(file, one.file, "control") for one in nets]
            images = [self._path(file, one.image) for one in nets]
            found["control"] = tuple(
                str(replace(one, file=net, image=image))
                for one, net, image in zip(nets, weights, images, strict=True)
            )
        return found

    def _path(self, file: str, recorded: str, setting: str = "") -> str:
        """Where a file of this name is. CannotRepeat if it is nowhere."""
        name = PurePath(recorded).name
        for folder in self._searched(file):
            if name and (folder / name).exists():
                return str(folder / name)
        made = f"it was made {MADE.get(setting, 'from')} {recorded}"
        raise CannotRepeat(f"{made}, which is not here; give its folder as --folder DIR")

    def _searched(self, file: str) -> list[Path]:
        """Where the files are looked for that an image names."""
        own = Path(file).absolute().parent
        return [*self.folders, own, own.parent, Path()]


def _kind(recorded: Mapping[str, Any], task: str) -> str:
    """Which of `PARSERS` takes the settings of an image."""
    if recorded.get("noise_level") is not None:
        return "upscale"
    if recorded.get("mask") is not None or recorded.get("outpaint") is not None:
        return "inpaint"
    if recorded.get("depth") is not None or task == "depth":
        return "depth"
    return "init" if recorded.get("init_img") is not None else "text"
