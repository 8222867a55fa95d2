"""The models of a service by name: opened once, their weights in memory while they are in use."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import InputError
from ldm.log import LOG
from ldm.pipeline.adapters import Adapters
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.pipeline import LARGEST_BATCH, Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.service.errors import UnknownModel
from ldm.service.inputs import file_of, files_in
from ldm.weights.families import FAMILIES
from ldm.weights.loading import ModelFiles, find

FORM = "NAME=CKPT[,CONFIG]"


class NamedModel(NamedTuple):
    """A model that clients know by its name; without files it is the linked or bundled one."""

    name: str | None
    ckpt: str | None = None
    config: str | None = None


def parse_model(text: str) -> NamedModel:
    """What NAME=CKPT[,CONFIG] says. InputError for anything else."""
    name, equals, files = text.partition("=")
    ckpt, comma, config = files.partition(",")
    if not equals or not name.strip() or not ckpt or (comma and not config):
        raise InputError(f"--model {text!r}: give {FORM}")
    if not name.isprintable() or len(name) > 200:
        raise InputError(f"--model {text!r}: its name is not printable, or longer than 200 characters")
    return NamedModel(name.strip(), ckpt, config or None)


def bundled_models() -> list[NamedModel]:
    """The models that came with this repository, for text to image first."""
    found = {
        family.bundled: NamedModel(Path(family.bundled).parent.name, family.bundled, family.config)
        for family in FAMILIES
        if family.bundled and find(family.bundled).exists()
    }
    return list(found.values())


def name_of(files: ModelFiles) -> str:
    """The name of a model that got none: its file's, or its folder's where the file is just "model"."""
    return files.weights.parent.name if files.weights.stem == "model" else files.weights.stem


class Reader(Pipeline):
    """A pipeline that only reads requests, while another one of the same model samples in another thread."""

    @property
    def model(self) -> Any:
        raise InputError(
            f"{self.files.weights.name} does not say enough about its model for this request; the service "
            "needs the model's config, too"
        )


class FolderAdapters(Adapters):
    """LoRAs whose names are looked for in their folder, then among the files `beside` it, and never in the
    working folder.
    """

    def __init__(self, folder: str | None, beside: Sequence[Path] = ()):
        super().__init__(folder)
        self.beside = beside

    def _find(self, name: str) -> Path:
        if found := self.names().get(name.casefold()):
            return found[0]
        path = Path(name).absolute()
        is_beside = path in [one.absolute() for one in self.beside]
        if "/" in name and (is_beside or path.is_relative_to(self.folder.absolute())):
            return super()._find(name)
        known = {each.casefold(): one for one in self.beside for each in (one.name, one.stem)}
        if found := known.get(name.casefold()):
            return found
        return file_of(name, "lora", [*files_in(str(self.folder), "lora"), *self.beside])


@dataclass(frozen=True)
class OpenModel:
    """A model of which the config has been read, and how its pipelines are made."""

    reader: Reader
    lock: threading.Lock  # of the reader: one call at a time


class Models:
    """Pipelines by name. `resolve` may be called from any thread, `pipeline` from the one that samples.

    Weights are read when a model is first used; at most `loaded` models have theirs in memory, and the one
    that was used longest ago makes room. `loras` may be named beside those of the folder of LoRAs, which go
    first. `choices` are those of `Pipeline.open`. InputError for what cannot be used, as far as that can be
    seen without reading weights.
    """

    def __init__(
        self,
        named: Sequence[NamedModel | str] = (),
        runtime: RuntimeOptions | None = None,
        *,
        loaded: int = 1,
        loras: Sequence[Path] = (),
        **choices: Any,
    ):
        self.runtime, self.most, self.choices = runtime or RuntimeOptions(), loaded, choices
        self.loras = loras
        self._open: dict[str, OpenModel] = {}
        self._pipelines: OrderedDict[str, Pipeline] = OrderedDict()
        self.loads, self.evictions, self.load_seconds = 0, 0, 0.0
        self._seconds: dict[str, float] = {}  # that the newest load of a model took
        self.loaded_at = float("-inf")  # when the newest load ended, on the clock of time.monotonic
        self._evicted: dict[str, float] = {}  # when a model made room the last time, on the same
        for one in named or [NamedModel(None)]:
            self._add(parse_model(one) if isinstance(one, str) else one)

    def _add(self, one: NamedModel) -> None:
        reader = Reader.open(one.ckpt, one.config, self.runtime, **self.choices)
        reader.adapters = self._adapters()
        name = one.name or name_of(reader.files)
        if name in self._open:
            raise InputError(f"--model {name}: two models have this name")
        if not reader.files.weights.exists():
            raise InputError(f"--model {name}: there is no {reader.files.weights}")
        self._open[name] = OpenModel(reader, threading.Lock())

    def _adapters(self) -> Adapters:
        return FolderAdapters(self.choices.get("lora_folder"), self.loras)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the models' files are."""
        files = [model.reader.files for model in self._open.values()]
        return tuple({Path(file).parent for one in files for file in (one.weights, one.config) if file})

    def native_size(self, name: str) -> int:
        """The side in pixels of the images that a model was trained with."""
        return self.reader(name).described.native_size

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._open)

    @property
    def default(self) -> str:
        """The first one's name."""
        return next(iter(self._open))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the models whose weights are in memory, the one used last at the end."""
        return tuple(self._pipelines)

    def needs_room(self, name: str) -> bool:
        """Whether another model has to make room before this one can be used."""
        return name not in self._pipelines and len(self._pipelines) >= self.most

    def evicted(self, name: str) -> float:
        """When a model made room the last time, on the clock of `time.monotonic`; -inf if it never did."""
        return self._evicted.get(name, float("-inf"))

    def seconds_to_load(self, name: str) -> float:
        """As measured the last time; of a model that was never loaded, what the slowest one took, or 0."""
        return self._seconds.get(name, max(self._seconds.values(), default=0.0))

    def open(self, name: str) -> OpenModel:
        """UnknownModel if there is none of this name."""
        if name not in self._open:
            raise UnknownModel(name, self._open)
        return self._open[name]

    def reader(self, name: str) -> Reader:
        """What reads requests for a model and knows its files and its size; `resolve` has the lock for it."""
        return self.open(name).reader

    def task(self, name: str) -> str:
        """What a model does: "text", "inpaint", "depth" or "upscale"."""
        return self.reader(name).described.task

    def resolve(self, name: str, request: ImageRequest) -> tuple[ImageRequest, tuple[int, int]]:
        """The request with all that the model decides, and its image's height and width. InputError.

        It may wait for other requests to be resolved, but not for any to be sampled.
        """
        model = self.open(name)
        with model.lock:
            model.reader.forget_files()  # a LoRA may have changed, and no client's image stays in memory
            try:
                resolved = model.reader.resolve(request)
                return resolved, model.reader.image_size(resolved)
            finally:
                model.reader.forget_files()

    def pipeline(self, name: str) -> Pipeline:
        """The pipeline that samples, with its weights in memory. InputError if they cannot be read."""
        if name not in self._pipelines:
            model, start = self.open(name), time.monotonic()
            while len(self._pipelines) >= self.most:
                self._evict()
            config = copy.deepcopy(model.reader.config)
            pipeline = Pipeline(model.reader.files, config, self.runtime, **self.choices)
            pipeline.adapters = self._adapters()
            pipeline.model, pipeline.safety  # noqa: B018
            self._pipelines[name] = pipeline
            self.loaded_at = time.monotonic()
            self._seconds[name] = self.loaded_at - start
            self.loads += 1
            self.load_seconds += self._seconds[name]
            LOG.info("model %s is in memory", name)
        self._pipelines.move_to_end(name)
        return self._pipelines[name]

    def fitted(self, name: str, request: ImageRequest) -> int:
        """How many images like a resolved request's fit into memory at once, as far as that is known."""
        pipeline = self._pipelines.get(name)
        return LARGEST_BATCH if pipeline is None else pipeline.fitted(request)

    def _evict(self) -> None:
        """Give back the memory of the model that was used longest ago."""
        import torch

        from ldm.optimize.graph import free_recordings

        name, pipeline = self._pipelines.popitem(last=False)
        self._evicted[name] = time.monotonic()
        free_recordings(pipeline.model)
        is_cuda = pipeline.device.type == "cuda"
        del pipeline
        gc.collect()  # models have cycles
        if is_cuda:
            torch.cuda.empty_cache()
        self.evictions += 1
        LOG.info("model %s made room", name)

    def close(self) -> None:
        """Give back the memory of all models."""
        while self._pipelines:
            self._evict()
