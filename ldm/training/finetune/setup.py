"""From the words of the command to a task, and from its files to images of before and after."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.log import notice
from ldm.training.config import TrainingConfig, training_config
from ldm.training.data.config import data_config
from ldm.training.files import writing
from ldm.training.finetune.methods import (
    METHODS,
    Method,
    Sampling,
    Setup,
    readable_captions,
    readable_examples,
    train_source,
)
from ldm.training.sections import read_overrides
from ldm.weights.description import describe, prediction_of
from ldm.weights.loading import choose_model, default_weights, read_config, read_section

GRID = "before-after.png"
LAST = "last.ckpt"
OUTPUT = "--output"
SEEDS = 4  # images of each prompt in it, before and after


def prepare(
    method: Method,
    options: Any,
    folder: str | None,
    output: str,
    *,
    ckpt: str | None = None,
    config: str | None = None,
    weights: str | None = None,
    prompt: str | None = None,
    bases: Sequence[str] = (),
    given: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> Setup:
    """Everything about a fine-tuning that can be known, and refused, before the model is loaded.

    `given` are keys of the `training:` section from the command line; they and the images of `folder` go over
    those of the YAML files `bases`, which go over the method's, and `overrides` such as "data.flip=0.5" over
    all. InputError.
    """
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"--data {folder}: there is no such folder")
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt '' has no word")
    files = choose_model(config, ckpt, None)
    section = read_config(files.config)
    functions = method.functions
    source = getattr(functions, "train_source", None)
    size = describe(section).native_size
    read = [{name: read_section(Path(base), name, {}) for name in ("training", "data")} for base in bases]
    if folder is not None:
        for sections in read:
            sections["data"].pop("train", None)
    elif not any("train" in sections["data"] for sections in read):
        raise InputError("--data FOLDER is missing: the images to learn from")
    defaults = {"training": dict(method.training), "data": {**method.data, "size": size}}
    for override in overrides:
        if not override.startswith(("training.", "data.")) or "=" not in override:
            raise InputError(f"{override}: an override is like training.warmup=10 or data.flip=0.5")
    merged = _merged(overrides, defaults, *read, {"training": dict(given)})
    train = None
    if folder is not None:
        size = merged["data"]["size"]
        train = source(folder, prompt, size, options, files) if source else train_source(folder, prompt)
        merged = _merged(overrides, merged, {"data": {"train": train}})
    for name, each in settings_of(TrainingConfig).items():
        if each.group == "start" and merged["training"].get(name) is not None:
            raise InputError(f"training.{name}: a fine-tuning starts from --ckpt and --weights; leave it out")
    training = training_config({**merged["training"], "init": str(files.weights)})
    data = data_config(merged["data"])
    data.check_factor(describe(section).factor or 8)
    with _output(output) as path:
        setup = Setup(files, section, weights, training, data, path.with_suffix(""), path, prompt)
        if train is not None and data.train == train:
            _check_images(folder, prompt if method.prompt else prompt or "")
        _check_masks(setup)
        _check_schedule(method, setup, options)
        functions.check(setup, options)
        _check_resumed(method, setup, options)
    return setup


def _merged(overrides: Sequence[str], *sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections, the later over the earlier, and `section.key=value` over all of them. InputError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        merged = OmegaConf.merge(*sections, read_overrides(overrides))
        return OmegaConf.to_container(merged)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise InputError(f"{' '.join(overrides)} cannot be read: {' '.join(str(error).split())}") from error


@contextmanager
def _output(output: str) -> Iterator[Path]:
    """The file that a run leaves; its folder is there now, and is removed again if something is refused.

    InputError if it cannot be written.
    """
    path = Path(output)
    if path.suffix != ".safetensors":
        raise InputError(
            f"--output {output} is no .safetensors file; {path.with_suffix('.safetensors')} would be"
        )
    new = [folder for folder in (path.with_suffix(""), *path.parents) if not folder.exists()]
    with writing(f"--output {output}"):  # before the time that it takes to have something to write
        path.with_suffix("").mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        for folder in (path.parent, path.with_suffix("")):
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} is read-only")
    try:
        yield path
    except InputError:
        with suppress(OSError):  # what has something in it stays
            for folder in new:
                folder.rmdir()
        raise


def _check_masks(setup: Setup) -> None:
    """InputError for images without masks where an inpainting model is trained."""
    if describe(setup.section).task != "inpaint" or setup.data.masks:
        return
    import numpy as np

    from ldm.training.data.sources import open_sources
    from ldm.training.families import NEEDS_MASKS

    source, _ = open_sources(setup.data, cache=setup.folder)
    if np.any(getattr(source, "has_maps", {}).get("mask", False)):
        return
    example = next(readable_examples(setup), None)  # of a source that does not say which maps it has
    if example is not None and "mask" not in example.maps:
        raise InputError(NEEDS_MASKS)


def _check_schedule(method: Method, setup: Setup, options: Any) -> None:
    """InputError for another noise schedule than the model's where its weights stay as they are.

    Teacher and student would run on one that neither knows, and no small file says on which it was trained.
    """
    name = _name(method)
    whole = name == "full" or (name == "dreambooth" and not options.lora)
    if not setup.config.zero_terminal_snr or whole:
        return
    if not prediction_of(setup.section, setup.files.weights, setup.files.undecided).zero_snr:
        raise InputError(
            f"training: zero_terminal_snr: {setup.files.weights} is not marked as trained with it, and "
            f"--method {name} leaves its weights as they are: leave it out, or take --method full"
        )


def _check_resumed(method: Method, setup: Setup, options: Any) -> None:
    """InputError if the run that is to go on was another one."""
    from ldm.training.checkpoints import check_options, read_checkpoint

    path = setup.folder / LAST
    if path.exists():
        found = read_checkpoint(path, OUTPUT)
        check_options(path, found, recorded(method, setup, options), OUTPUT, say=False)


def recorded(method: Method, setup: Setup, options: Any) -> dict[str, Any]:
    """What a checkpoint keeps of the options; the model goes by its file's content."""
    from ldm.weights.hashes import file_hash
    from ldm.weights.header import read_header

    weights = setup.weights or default_weights(setup.section, read_header(setup.files.weights).tensors)
    ckpt = file_hash(setup.files.weights)
    return {"method": _name(method), "ckpt": ckpt, "weights": weights, **dataclasses.asdict(options)}


def _name(method: Method) -> str:
    (name,) = (name for name, each in METHODS.items() if each is method)
    return name


def _check_images(folder: str, prompt: str | None) -> None:
    """InputError for a folder without an image that can be read, or if none has a caption or `prompt`."""
    from ldm.training.data.example import DamagedExample
    from ldm.training.data.folder import ImageFolder

    why = ""
    try:
        source = ImageFolder(folder, prompt)
        for k in range(len(source)):
            try:
                source[k]
                return
            except DamagedExample as error:
                why = why or str(error)
        raise InputError(f"--data {folder}: none of its {len(source)} images can be read ({why})")
    except InputError as error:
        if "caption" in str(error):
            raise InputError(
                f'--data {folder}: its images have no captions: give --prompt "a zqx vase", a rare word and '
                "what it is, or a .txt file beside each image"
            ) from error
        raise


def new_task(method: Method, setup: Setup, options: Any) -> Any:
    """The task with its model loaded; one line says what it is about."""
    import torch

    from ldm.weights.loading import load_model

    model = load_model(
        setup.section, setup.files.weights, setup.weights, (), torch.float32, setup.files.undecided
    )
    if model.zero_terminal_snr:  # its file says so, and samplers rescale its schedule
        config = dataclasses.replace(setup.config, zero_terminal_snr=True)
        setup = dataclasses.replace(setup, config=config)
    task = method.functions.new_task(model, setup, options)
    task.method_options, task.output_option = recorded(method, setup, options), OUTPUT
    source, _ = task.opened = task.sources(setup.folder)
    count = sum(weight.numel() for weight in task.trained().values())
    steps = f"{setup.config.steps:,} steps of {setup.config.batch_size}"
    notice(
        f"{len(source):,} images, {steps}, {count:,} trained parameters; {setup.output}, and all else in "
        f"{setup.folder}"
    )
    return task


def with_processes(setup: Setup, fabric: Any) -> Setup:
    return dataclasses.replace(setup, fabric=fabric)


def finished(files: Sequence[Path], setup: Setup) -> list[Path]:
    """The files of a run, the first of which is now the output."""
    with writing(setup.output):
        return [files[0].replace(setup.output), *files[1:]] if files else []


def compare(method: Method, files: Sequence[Path], setup: Setup, options: Any) -> Path:
    """An image of samples: a row for each prompt, on the left before, on the right after.

    They are made as txt2img.py makes them, with the files of the run, in `sample_steps`.
    """
    import numpy as np
    from tqdm import tqdm

    from ldm.images.pixels import make_grid
    from ldm.pipeline.options import RuntimeOptions
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import ImageRequest
    from ldm.training.loop import write_image

    how: Sampling = method.functions.sampling(files, setup, options)
    prompts = list(setup.config.sample_prompts or how.prompts or ([setup.prompt] if setup.prompt else []))
    if not prompts:
        prompts = list(islice(readable_captions(setup), 3))

    def open_pipeline(ckpt: Path) -> Pipeline:
        which = setup.weights if ckpt == setup.files.weights else None
        return Pipeline.load(
            str(ckpt), str(setup.files.config), RuntimeOptions(batch_size=SEEDS), weights=which, safety="off"
        )

    common = {"steps": setup.config.sample_steps, "sampler": "dpmpp_2m", **_first_image(setup)}
    rows: dict[tuple[int, bool], list[np.ndarray]] = {}
    plain = open_pipeline(setup.files.weights)
    with tqdm(total=2 * SEEDS * len(prompts), desc="samples") as bar:
        for after in (False, True):
            pipeline = open_pipeline(how.ckpt) if after and how.ckpt else plain
            fields = {**common, **(how.fields if after else how.before)}
            for row, prompt in enumerate(prompts):
                requests = [ImageRequest(prompt, seed=setup.config.seed + k, **fields) for k in range(SEEDS)]
                rows[row, after] = []
                for image in pipeline.generate(requests):
                    if image.pixels is None:
                        raise InputError(f"{files[0]}: an image of {prompt!r} is not finite")
                    rows[row, after].append(image.pixels)
                    bar.update()
    path = setup.folder / GRID
    cells = [cell for row in range(len(prompts)) for after in (False, True) for cell in rows[row, after]]
    write_image(make_grid(cells, 2 * SEEDS), path)
    return path


def _first_image(setup: Setup) -> dict[str, Any]:
    """What samples of a model that is given an image start from: the first one that can be read."""
    from PIL import Image

    from ldm.training.data.images import fitted

    described = describe(setup.section)
    if described.task not in ("depth", "upscale"):
        return {}
    side = setup.data.size
    image = Image.fromarray(fitted(next(readable_examples(setup)), (side, side)).image)
    if described.task == "depth":
        return {"init_img": image, "strength": 1.0}
    factor = described.factor or 4
    return {"init_img": image.resize((side // factor,) * 2, Image.Resampling.BOX), "noise_level": 20}
