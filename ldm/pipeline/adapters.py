"""LoRAs on a pipeline's model: which files they are, which of them are merged into its weights right now."""

from __future__ import annotations

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.errors import FieldError, InputError
from ldm.log import notice
from ldm.machine import host_memory
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.openclip import SelfAttention
from ldm.optimize.calls import call_states
from ldm.optimize.replaced import Replaceable, State
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.adapters import SUFFIXES, NamedLora
from ldm.weights.files import exists, files_below, user_file
from ldm.weights.hashes import FileHash
from ldm.weights.header import read_header
from ldm.weights.loading import find
from ldm.weights.lora import LoraFile, Match, as_product, merge
from ldm.weights.lora_names import TEXT, UNET, Target, targets

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

FOLDER = "models/loras"
SHOWN = 5  # names in an error
KEPT, SPARE = 2, 3  # sets whose weights are kept, where this many times their memory is free


class Merged(NamedTuple):
    """A LoRA that is, or is to be, in the weights of a model."""

    file: LoraFile
    weight: float
    text_weight: float

    def of(self, name: str) -> float:
        """The weight with which it is in a tensor of this name."""
        return self.text_weight if name.startswith(TEXT) else self.weight


Set = tuple[Merged, ...]


class Adapters:
    """The LoRAs of a pipeline. The model's own weights come back bit for bit when none is asked for.

    Weights are merged, so that an image takes no longer than without them, and everything that makes the
    model fast goes on. `folder` is where names without a path are looked for.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = find(str(folder or FOLDER))
        self.others: tuple[Path, ...] = ()
        self.is_default = folder is None
        self.files: dict[Path, LoraFile] = {}
        self.hashes: WeakKeyDictionary[LoraFile, FileHash] = WeakKeyDictionary()
        self.on: Set | None = ()  # None: a change was interrupted
        self.replaced: dict[str, Replaceable] = {}
        self._kept: OrderedDict[Set, dict[str, State]] = OrderedDict()  # weights of sets, on a CPU
        self._found: dict[str, Path] = {}
        self._reported: set[Merged] = set()
        self._matches: WeakKeyDictionary[LoraFile, Match] = WeakKeyDictionary()

    # Files

    def look_in(self, folders: Iterable[Path]) -> None:
        """Look for files in these folders, too, and there first; not in the folders below them."""
        self.others = tuple(folders)
        self._found.clear()

    def find(self, name: str) -> Path:
        """The file of a LoRA: a path, or a name in the folder in any case, suffix or not. InputError."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Path:
        for folder in self.others:
            if found := _in_folder(folder, PurePath(name).name):
                return found
        with user_file(name):
            if Path(name).is_file():
                return Path(name)
        known = self.names()
        found = known.get(name.casefold(), [])
        if len(found) > 1:
            found = [path for path in found if path.relative_to(self.folder) == Path(name)] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise FieldError(
                "{name!r} is the name of {count} LoRAs in {folder} ({lora_folder}): {listed}; give one of "
                "these paths",
                name=name,
                count=len(found),
                folder=self.folder,
                listed=", ".join(str(path.relative_to(self.folder)) for path in found[:SHOWN]),
            )
        listed, what = "", "the folder has none"
        if known:
            stems = list(dict.fromkeys(path.stem for paths in known.values() for path in paths))
            by_case = {stem.casefold(): stem for stem in stems}
            wanted = Path(name).stem.casefold()
            near = [by_case[one] for one in difflib.get_close_matches(wanted, by_case, SHOWN, 0.4)]
            listed = ", ".join(near or sorted(stems)[:SHOWN])
            what = "the nearest are " if near else "there are "
        raise FieldError(
            "there is no LoRA {name!r}, neither as a path nor in {folder} ({lora_folder}); {what}{listed}",
            name=name,
            folder=self.folder,
            what=what,
            listed=listed,
        )

    def names(self) -> dict[str, list[Path]]:
        """The files in the folder and those below it.

        They are by their names and by their paths from there, in lower case, with suffix and without.
        """
        found: dict[str, list[Path]] = {}
        if not exists(self.folder) or not self.folder.is_dir():
            return found
        for path in _weights_among(files_below(self.folder)):
            inside = path.relative_to(self.folder)
            for name in {path.name, path.stem, str(inside), str(inside.with_suffix(""))}:
                found.setdefault(name.casefold(), []).append(path)
        return found

    def file(self, path: Path) -> LoraFile:
        """InputError for one that cannot be read or is no LoRA."""
        if path not in self.files:
            self.files[path] = LoraFile(path)
        return self.files[path]

    def set_of(self, request: ImageRequest) -> Set:
        """The LoRAs of a request. InputError for a file that is not there, cannot be read or is no LoRA."""
        named: tuple[NamedLora, ...] = request.loras
        return tuple(Merged(self.file(self.find(one.file)), one.weight, one.text_weight) for one in named)

    def files_of(self, request: ImageRequest) -> list[LoraFile]:
        """The different files of a request's LoRAs. InputError as of `set_of`."""
        return list(dict.fromkeys(one.file for one in self.set_of(request)))

    def forget(self) -> None:
        """Look for files anew from now on, and read those anew that have changed.

        All else is kept by `LoraFile`, of which a changed file gets another one: its weights are merged anew.
        """
        self._found.clear()
        changed = {file for file in self.files.values() if file.has_changed}
        for file in changed:
            del self.files[file.path]
            file.let_go()
        self._reported = {one for one in self._reported if one.file not in changed}
        for one in [one for one in self._kept if changed.intersection(each.file for each in one)]:
            del self._kept[one]

    # Requests

    def check(self, pipeline: Pipeline, request: ImageRequest) -> None:
        """InputError for LoRAs that cannot be had with this model, before its weights are read.

        A notice for each: how many of its layers the model has.
        """
        for one in self.set_of(request):
            if one in self._reported:
                continue
            if pipeline.options.compile and pipeline.device.type == "cpu":
                raise FieldError(
                    "{lora} and {compile} exclude each other on a CPU: OpenVINO compiles the weights in; "
                    "leave one of them out"
                )
            match = one.file.match(self._targets_of_files(pipeline))
            self._reported.add(one)
            self.hash(one.file)
            text = f", {one.text_weight:g} for the text" if one.text_weight != one.weight else ""
            left_out = f"; {match.notice}" if match.notice else ""
            advice = f"; its file advises: {one.file.advice}" if one.file.advice else ""
            notice(
                f"{one.file.path.name}: {len(match.layers)} of {match.total} layers, "
                f"weight {one.weight:g}{text}{left_out}{advice}"
            )

    def _targets_of_files(self, pipeline: Pipeline) -> Mapping[str, Target]:
        """What can be changed, by the checkpoint's header, or by the model where that is built."""
        if "model" in vars(pipeline):
            return self.targets(pipeline.model)
        if "_header_targets" not in vars(self):
            tensors = read_header(pipeline.files.weights).tensors
            # of a file with averaged weights alone, the UNet's have other names
            whole = any(name.startswith(UNET) for name in tensors)
            shapes = {name: each.shape for name, each in tensors.items()} if whole else {}
            self._header_targets = targets(shapes)
        return self._header_targets or self.targets(pipeline.model)

    def hash(self, file: LoraFile) -> FileHash:
        """A LoRA's hash as sharing sites have it, which is computed in a thread."""
        if file not in self.hashes:
            self.hashes[file] = FileHash(file.path, lora_hash)
        return self.hashes[file]

    def recorded(self, request: ImageRequest) -> dict[str, str]:
        """What an image records of its LoRAs beside the request's own, as "name: hash, …".

        `lora_hashes` are of their values, and `lora_settings` of peft's settings beside these, if they decide
        how strong a file is.
        """
        files = self.files_of(request)
        hashes = [f"{file.path.stem}: {self.hash(file).result()}" for file in files]
        digests = [f"{file.path.stem}: {digest}" for file in files if (digest := file.settings_digest)]
        found = {"lora_hashes": ", ".join(hashes), "lora_settings": ", ".join(digests)}
        return {name: text for name, text in found.items() if text}

    def differences(self, request: ImageRequest, recorded: Mapping[str, Any]) -> list[str]:
        """The request's LoRAs that are not as an image with the settings `recorded` had them, a line each."""
        known, digests = (_by_name(recorded.get(name)) for name in ("lora_hashes", "lora_settings"))
        lines = []
        for file in self.files_of(request):
            name, ours = file.path.stem, self.hash(file).result()
            hashes = known.get(name, [])
            if hashes and not any(ours.startswith(theirs[:12].lower()) for theirs in hashes):
                found = " and ".join(hashes)
                lines.append(f"that image is by another {file.path.name} ({found}), this is {ours}")
            elif name in digests and file.settings_digest not in digests[name]:
                lines.append(f"{file.path.name} had another strength, as its rank or alpha has changed")
        return lines

    def digests(self, request: ImageRequest) -> dict[str, str]:
        """Hashes of the content of a request's files, by which a run is taken up again.

        `lora_hash` leaves out the header, whose settings may decide how strong a file is.
        """
        files = self.files_of(request)
        both = [filter(None, (self.hash(file).result(), file.settings_digest)) for file in files]
        content = ", ".join(map("/".join, both))
        return {"lora content": content} if content else {}

    # The model

    def targets(self, model: LatentDiffusion) -> Mapping[str, Target]:
        if "_targets" not in vars(self):
            self._targets = targets({name: shape for name, (_, _, shape) in changeable(model).items()})
        return self._targets

    @property
    def text_key(self) -> tuple:
        """What embeddings of prompts depend on: equal keys, equal text encoders."""
        changing = [one for one in self.on or () if one.text_weight and self._matches[one.file].for_text]
        return tuple((one.file.path, one.file.state, one.text_weight) for one in changing)

    def put_on(self, model: LatentDiffusion, request: ImageRequest) -> None:
        """Let the model's weights be those with the request's LoRAs, and no others."""
        wanted = self.set_of(request)
        if wanted == self.on:
            return
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            self._merge(model, wanted)

    def _merge(self, model: LatentDiffusion, wanted: Set) -> None:
        bring_home = getattr(model, "bring_home", None)  # of weights that are on the device only while in use
        if bring_home:
            bring_home()
        self.on = None
        known = self.targets(model)
        changes: dict[str, list] = {}
        for one in wanted:
            if one.file not in self._matches:
                self._matches[one.file] = one.file.match(known)
            for layer, target in self._matches[one.file].layers.items():
                if weight := one.of(target.name):
                    changes.setdefault(target.name, []).append((one.file, layer, weight, target.third))
        layers = changeable(model)
        where = in_place(model)
        for name in changes.keys() - self.replaced.keys():
            layer, parameter, shape = layers[name]
            self.replaced[name] = Replaceable(layer, parameter, shape, where)
        kept = self._kept.get(wanted, {})
        for name, replaced in self.replaced.items():
            if name not in changes:
                replaced.restore()
                continue
            if name in kept:
                replaced.put_back(kept[name])
                continue
            factors = [(file.change(layer), weight, third) for file, layer, weight, third in changes[name]]
            product = as_product(factors) if replaced.takes_products else None
            if product and replaced.add_product(*product):
                continue
            plain = replaced.plain.to(model.device)
            replaced.replace(merge(plain, factors, overwrite=not replaced.is_kept))
        for state in call_states(model.model.diffusion_model):
            state.forget()
        self.on = wanted
        for file in set(self.files.values()).difference(one.file for one in wanted):
            file.let_go()
        if not where:
            self._keep(wanted, {name: self.replaced[name].state() for name in changes})

    def _keep(self, wanted: Set, states: dict[str, State]) -> None:
        """Keep what was made for a set, and for the one before if there is room, as they may take turns."""
        self._kept.pop(wanted, None)
        self._kept[wanted] = states
        room = host_memory()[1] > SPARE * bytes_of(states.values())
        while len(self._kept) > (KEPT if room else 1):
            self._kept.popitem(last=False)


def _by_name(recorded: Any) -> dict[str, list[str]]:
    """The hashes of "name: hash, …"; several LoRAs of an image have one name if their folders differ."""
    known: dict[str, list[str]] = {}
    for one in str(recorded or "").split(", "):
        name, _, theirs = one.rpartition(": ")
        known.setdefault(name, []).append(theirs)
    return known


def _weights_among(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix[1:].lower() in SUFFIXES)


def _in_folder(folder: Path, name: str) -> Path | None:
    """The file of this name in a folder, in any case, suffix or not. InputError if there are several."""
    with user_file(folder / name):
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        return None
    with user_file(folder):
        paths = _weights_among(folder.iterdir())
    found = [path for path in paths if name.casefold() in (path.name.casefold(), path.stem.casefold())]
    if len(found) > 1:
        listed = ", ".join(path.name for path in found[:SHOWN])
        raise InputError(f"{name!r} is the name of {len(found)} files in {folder}: {listed}")
    return found[0] if found else None


def bytes_of(made: Any) -> int:
    """Bytes of what is made of weights, as `State` has it: tensors, in any order, and collections of them."""
    if isinstance(made, Tensor):
        return made.nbytes
    return sum(map(bytes_of, made)) if isinstance(made, Iterable) else 0


def in_place(model: LatentDiffusion) -> bool:
    """Whether weights must stay where they are: recorded graphs and `offload` know addresses."""
    return model.device.type != "cpu"


def changeable(model: LatentDiffusion) -> dict[str, tuple[nn.Module, str, tuple[int, ...]]]:
    """The weights that LoRAs can change: layer, parameter and shape by name, packed ones, too."""
    found: dict[str, tuple[nn.Module, str, tuple[int, ...]]] = {}
    for part in ("model", "cond_stage_model"):
        for name, module in getattr(model, part).named_modules(prefix=part):
            if isinstance(module, nn.Linear):
                found[f"{name}.weight"] = module, "weight", (module.out_features, module.in_features)
            elif isinstance(module, nn.Conv2d):
                kernel = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
                found[f"{name}.weight"] = module, "weight", kernel
            elif isinstance(module, SelfAttention):
                found[f"{name}.in_proj_weight"] = module, "in_proj_weight", tuple(module.in_proj_weight.shape)
    return found


def lora_hash(path: str | Path) -> str:
    """Twelve hex digits of the SHA-256 of a `.safetensors` file without its header, A1111's "Lora hashes".

    Training tools change the header's remarks later. Of other files it is that of the whole. InputError for a
    file that cannot be read. Source: `addnet_hash_safetensors` in the web UI's modules/hashes.py.
    """
    path = Path(path)
    with user_file(path), path.open("rb") as file:
        if path.suffix.lower() == ".safetensors":
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
