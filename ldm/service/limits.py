"""What a service makes for anybody, and which files requests may name."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import InputError
from ldm.images.metadata import check_sides
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest
from ldm.pipeline.settings.passes import LANCZOS, LATENT
from ldm.service.errors import BadRequest, LimitExceeded, from_input_error
from ldm.service.options import ServiceOptions
from ldm.service.schema import MOST_FILES, check_texts

MOST_PARTS = 16  # of a prompt; the UNet is run for each of them at every step


def check_limits(request: ImageRequest, options: ServiceOptions, most_pixels: int) -> None:
    """LimitExceeded for a request that asks for more than this service makes, by its own values alone."""
    check_texts(vars(request), options.max_prompt)
    steps, parts = request.steps_to_run + request.second_steps, max(1, request.parts)
    if steps > options.max_steps:
        raise LimitExceeded(f"steps: {steps} are more than this service's {options.max_steps}")
    if parts > MOST_PARTS:
        raise LimitExceeded(f"prompt: {parts} parts joined by AND are more than this service's {MOST_PARTS}")
    if steps * parts > options.max_steps:
        raise LimitExceeded(
            f"steps: {steps} steps for each of the prompt's {parts} parts (AND) are {steps * parts}, "
            f"more than this service's {options.max_steps}; ask for fewer of either"
        )
    if size := asked_size(request):
        check_size(*size, most_pixels)


def asked_size(request: ImageRequest) -> tuple[int, int] | None:
    """Height and width in pixels, before they are rounded, of the image that a request asks for.

    None where the request leaves them to the model.
    """
    height, width = request.height, request.width
    if request.init_img is not None and not (height and width):
        across, down = request.init_img.size  # from which the other side follows, or both
        if not (height or width):
            height, width = down, across
        height, width = height or width * down / across, width or height * across / down
    factor = request.hires or 1.0
    return (round(height * factor), round(width * factor)) if height and width else None


def check_format(request: ImageRequest, format: str) -> None:
    """BadRequest for an image that, by the request's own values, no file of a format ("webp") can hold."""
    if size := asked_size(request):
        try:
            check_sides(*size, format)
        except InputError as error:
            raise from_input_error(error) from error


def check_size(height: int, width: int, most_pixels: int) -> None:
    """LimitExceeded for an image of too many pixels."""
    if height * width > most_pixels:
        raise LimitExceeded(f"{width}x{height} are {height * width:,} pixels; the most is {most_pixels:,}")


def check_files(request: ImageRequest, options: ServiceOptions) -> None:
    """BadRequest for a request that names files which the options do not offer, or images by file.

    Whoever makes requests of what clients send has checked that before; here is the last door.
    """
    images = {name: getattr(request, name) for name in IMAGE_SETTINGS}
    images |= {f"control {k}": one.image for k, one in enumerate(request.controls)}
    for name, value in images.items():
        if isinstance(value, str):
            raise BadRequest(f"{name}: give the image itself, not a file's name")
    if request.hires_upscaler not in (None, LATENT, LANCZOS):
        raise BadRequest(f"hires_upscaler: this service has {LATENT} and {LANCZOS}")
    try:
        loras = [one.file for one in request.loras]
    except InputError as error:
        raise from_input_error(error) from error
    if len(loras) > MOST_FILES:
        raise LimitExceeded(f"lora: {len(loras)} with those of the prompt are more than {MOST_FILES}")
    for name in loras:
        if name not in options.offered:
            check_inside("lora", name, options.lora_folder, by_name=True)
    for text in request.embedding:
        if text not in options.offered:
            check_inside("embedding", text, options.embedding_folder)
    for one in request.controls:
        if one.file not in options.offered:
            check_inside("control", one.file, options.control_folder)


def check_inside(field: str, name: str, folder: str | None, by_name: bool = False) -> None:
    """BadRequest unless a file is inside a folder; with `by_name` its name or path from there is looked for.

    Whether there is such a file is not asked: the answer would show what else lies on the service's disk.
    """
    if folder is None:
        raise BadRequest(f"{field}: this service has none")
    path = Path(name)
    is_name = by_name and not path.is_absolute() and not set("\\~") & set(name)
    inside = path.absolute().is_relative_to(Path(folder).absolute())
    if ".." in path.parts or not (is_name or inside):
        raise BadRequest(f"{field}: there is no {path.name!r} here")
