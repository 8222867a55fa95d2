"""A diffusers folder: which of its files hold the weights, what its configs say, its state dict in our names.

    model_index.json                       the class of the pipeline, and of each of its parts
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    vae/…  text_encoder/model.safetensors  depth_estimator/…  scheduler/scheduler_config.json  tokenizer/…

Weights may be `.safetensors` or `.bin`, in shards with an index, or a variant (`model.fp16.safetensors`).
Importing this module does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.weights import diffusers_names as names
from ldm.weights.files import exists, user_file
from ldm.weights.header import Header, read_header

if TYPE_CHECKING:
    from ldm.weights.diffusers_names import State

INDEX = "model_index.json"
DEPTH = "StableDiffusionDepth2ImgPipeline"
UPSCALE = "StableDiffusionUpscalePipeline"
INPAINT = "StableDiffusionInpaintPipeline"
TEXT = "StableDiffusionPipeline"
PIPELINES = (TEXT, "StableDiffusionImg2ImgPipeline", INPAINT, f"{INPAINT}Legacy", DEPTH, UPSCALE)

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
MIDAS = "depth_model.model."
# Scales that the published configs state. Another one travels in the weights, as in models that were
# trained with scale_by_std.
PUBLISHED_SCALES = (0.18215, 0.08333)
# The names that diffusers and transformers give to files of weights, or to an index of shards.
WEIGHT_FILE = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>\w+))?\.(?P<format>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)

SHARD = re.compile(r"-\d+-of-\d+(\.\w+)?\.(safetensors|bin)$")


@dataclass(frozen=True)
class Part:
    """One network of a pipeline."""

    folder: str
    prefix: str  # of its weights here
    to_ours: Callable[[State], State]  # their names -> ours without the prefix


UNET_PART = Part("unet", UNET, names.unet_to_ours)
VAE_PART = Part("vae", VAE, names.vae_to_ours)
CLIP_PART = Part("text_encoder", CLIP, dict)
OPEN_CLIP_PART = Part("text_encoder", OPEN_CLIP, names.open_clip_to_ours)
MIDAS_PART = Part("depth_estimator", MIDAS, names.midas_to_ours)


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a `model_index.json`."""
    return exists(Path(path) / INDEX)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError for a file that is none."""
    with user_file(path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__} instead of a JSON object")
    return content


def pipeline_class(folder: Path) -> str:
    """The class that a folder's `model_index.json` names; InputError for one that cannot be run here."""
    name = read_json(folder / INDEX).get("_class_name")
    if name not in PIPELINES:
        what = f"a {name}" if isinstance(name, str) else "of no pipeline class"
        raise InputError(f"{folder} is {what}, which cannot be run here: give one of {', '.join(PIPELINES)}")
    return name


def check_folder(folder: Path) -> None:
    """InputError if a diffusers folder is of another pipeline, or lacks a part or a shard of one.

    Only names and sizes of files are looked at.
    """
    for part in _parts(folder):
        weight_files(folder / part.folder)


def _parts(folder: Path) -> list[Part]:
    """The parts that the folder's pipeline has; InputError naming the folders that are missing."""
    name = pipeline_class(folder)
    wanted = ["unet", "vae", "text_encoder"] + (["depth_estimator"] if name == DEPTH else [])
    lacking = [part for part in wanted if not (folder / part).is_dir()]
    if lacking:
        raise InputError(
            f"{folder} lacks {' and '.join(f'{part}/' for part in lacking)} of its {name}: "
            "download or copy the whole folder"
        )
    text = _config(folder / "text_encoder")
    if not text:
        raise InputError(
            f"{folder} lacks text_encoder/config.json, which says whose text encoder it is: "
            "download or copy the whole folder"
        )
    # SD 2's text encoder is OpenCLIP's, which has the exact GELU
    is_open_clip = text.get("hidden_act", "quick_gelu") == "gelu"
    parts = [UNET_PART, VAE_PART, OPEN_CLIP_PART if is_open_clip else CLIP_PART]
    return parts + ([MIDAS_PART] if name == DEPTH else [])


def _config(part: Path) -> dict[str, Any]:
    """The part's `config.json`, empty if there is none."""
    path = part / "config.json"
    return read_json(path) if exists(path) else {}


def weight_files(part: Path) -> list[Path]:
    """The file, or the shards, with the weights of one part of a pipeline.

    Where a folder has several, the full-precision ones come first, as in diffusers, and `.safetensors` before
    `.bin`. InputError if there are none, or an index names shards that are not there.
    """
    with user_file(part):
        entries = sorted(path.name for path in part.iterdir())
    found = []
    for name in entries:
        if match := WEIGHT_FILE.fullmatch(name):
            variant = match["variant"] or match["index_variant"] or ""
            is_bin, is_index = match["format"] == "bin", match["index"] is not None
            found.append(((variant != "", variant != "fp16", variant, is_bin, is_index), name))
    if not found:
        stem = "diffusion_pytorch_model" if part.name in ("unet", "vae") else "model"
        if shards := [name for name in entries if SHARD.search(name)]:
            index = f"{SHARD.sub('', shards[0])}{Path(shards[0]).suffix}.index.json"
            raise InputError(
                f"{part} has shards of weights without their index ({index}): "
                "download or copy the whole folder"
            )
        raise InputError(f"{part} has no weights ({stem}.safetensors): download or copy the whole folder")
    path = part / min(found)[1]
    files = _shards(path) if path.suffix == ".json" else [path]
    for file in files:
        with user_file(file):
            if file.stat().st_size == 0:
                raise InputError(f"{file} is empty: download or copy it again")
    return files


def _shards(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index} lists no weights")
    shards = sorted({str(name) for name in listed.values()})
    if strange := [name for name in shards if Path(name).name != name]:  # no index may name a file elsewhere
        raise InputError(f"{index} names {strange[0]!r}, which is not a file of its folder")
    if lacking := [name for name in shards if not (index.parent / name).is_file()]:
        raise InputError(
            f"{index} names {len(shards)} shards, of which {', '.join(lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} missing: download or copy the whole folder"
        )
    return [index.parent / name for name in shards]


def unet_file(folder: Path) -> Path:
    """The file that stands for a folder where one is needed: its UNet's weights, or their first shard."""
    return weight_files(folder / "unet")[0]


@dataclass(frozen=True)
class FolderHints:
    """What a folder's configs say that its weights cannot."""

    pipeline: str  # its class
    parameterization: str | None  # "eps" or "v"; None without a scheduler
    zero_snr: bool  # trained on a schedule with zero terminal SNR
    scale_factor: float | None  # of the latents


def folder_hints(folder: str | Path) -> FolderHints:
    """What the configs of a diffusers folder say; InputError for one that cannot be run here."""
    folder = Path(folder)
    path = folder / "scheduler/scheduler_config.json"
    scheduler = read_json(path) if exists(path) else None
    parameterization = None
    if scheduler is not None:
        prediction = scheduler.get("prediction_type", "epsilon")  # schedulers older than v-models lack it
        known = {"epsilon": "eps", "v_prediction": "v"}
        if not isinstance(prediction, str) or prediction not in known:
            raise InputError(
                f"{path} has prediction_type {prediction!r}, which is not one of {', '.join(known)}"
            )
        parameterization = known[prediction]
    scale = _config(folder / "vae").get("scaling_factor")
    if isinstance(scale, int | float) and not 0 < scale < 1000:
        raise InputError(f"{folder / 'vae/config.json'} has a scaling_factor outside 0 … 1000")
    return FolderHints(
        pipeline_class(folder),
        parameterization,
        bool((scheduler or {}).get("rescale_betas_zero_snr")),
        float(scale) if isinstance(scale, int | float) else None,
    )


@dataclass(frozen=True)
class FolderHeader(Header):
    """The header of a diffusers folder as that of a single file in our names.

    Its metadata hold what the scheduler's config says of the prediction.
    """

    def map(self) -> State:
        """The tensors, in the memory of the mapped files."""
        return read_folder(self.path, lambda path: read_header(path).map())


def read_folder_header(folder: Path) -> FolderHeader:
    """The names, shapes and dtypes of a diffusers folder's weights in our names.

    A v2 folder has no last block of OpenCLIP's text transformer, which is never used, and none has the
    buffers of a schedule. `ztsnr` marks one whose scheduler rescales to zero terminal SNR, and `scale_factor`
    is there where it is none of the published ones. InputError as in `check_folder`.
    """

    dropped: dict[str, str] = {}

    def outlines(path: Path) -> State:
        header = read_header(path)
        dropped.update({f"{path.parent.name}.{name}": dtype for name, dtype in header.dropped.items()})
        return {name: names.Outline(str(t.dtype), tuple(t.shape)) for name, t in header.tensors.items()}

    prediction = {"eps": "epsilon", "v": "v_prediction", None: None}[folder_hints(folder).parameterization]
    metadata = {"prediction_type": prediction} if prediction else {}
    tensors = read_folder(folder, outlines)
    return FolderHeader(folder, tensors, buffer=None, metadata=metadata, dropped=dropped)


def read_folder(folder: Path, read: Callable[[Path], State]) -> State:
    """The state dict of a diffusers folder in our names; `read` gives that of one file.

    See `read_folder_header` for what it holds.
    """
    state: State = {}
    for part in _parts(folder):
        state |= read_part(folder / part.folder, part, read)
    hints = folder_hints(folder)
    extra = {}
    if hints.zero_snr:
        extra["ztsnr"] = []
    if hints.scale_factor is not None and hints.scale_factor not in PUBLISHED_SCALES:
        extra["scale_factor"] = hints.scale_factor
    if isinstance(next(iter(state.values())), names.Outline):
        return state | {name: names.Outline("float32", (0,) * (value == [])) for name, value in extra.items()}
    import torch

    return state | {name: torch.tensor(value) for name, value in extra.items()}


def read_part(path: Path, part: Part, read: Callable[[Path], State]) -> State:
    """One network of a pipeline from its folder, in our names; `read` as in `read_folder`."""
    theirs: State = {}
    for file in weight_files(path):
        theirs |= read(file)
    return translated(part, theirs)


def translated(part: Part, theirs: State) -> State:
    """One network of a pipeline in our names with their prefix."""
    if part.folder == "text_encoder":
        theirs = {name.removeprefix("text_model."): t for name, t in theirs.items()}
    return {part.prefix + name: t for name, t in part.to_ours(theirs).items()}
