"""The API of AUTOMATIC1111's web UI, as far as its clients make images with it.

Source: modules/api/{api,models}.py of AUTOMATIC1111/stable-diffusion-webui. A field that is not known, or
does nothing here, is ignored as there; the reply's `info` lists these under `ignored`. Prompts are read by
the web UI's rules. Each client has a checkpoint and a CLIP skip of its own; POST /sdapi/v1/options sets them.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from ldm import __version__
from ldm.errors import InputError
from ldm.images.metadata import texts_of
from ldm.pipeline.infotext import a1111_guidance, a1111_sampling, image_texts, own_scale, parse_a1111
from ldm.pipeline.request import MAX_SEED, SAMPLER_OPTIONS, ImageRequest, image_seed
from ldm.pipeline.settings.guidance import CFG_PP_SAMPLERS
from ldm.pipeline.settings.passes import LANCZOS, LATENT
from ldm.pipeline.settings.text import A1111
from ldm.sampling import catalogue
from ldm.service.answers import base64_of, json_answer
from ldm.service.errors import (
    BadRequest,
    LimitExceeded,
    ServiceError,
    UnknownModel,
    from_input_error,
    in_names,
)
from ldm.service.inputs import image_of, json_object, text_of
from ldm.service.schema import number_of, request_of

if TYPE_CHECKING:
    from ldm.service.app import OutputFile, Service
    from ldm.service.jobs import Job

DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_SCALE = "Euler", 50, 7.0  # the web UI's API's
TEXT_STRENGTH, IMAGE_STRENGTH, MASK_BLUR = 0.7, 0.75, 4
FROM_IMAGES = ("upscale", "depth")  # tasks of models that need an image
BLURS = ("mask_blur", "mask_blur_x", "mask_blur_y")  # here one, which is that of both directions
RESIZE = ("stretch", "crop", "pad")  # by the web UI's numbers; 3 is "latent upscale"
# By inpainting_fill: what sampling starts from under the mask. Here it is always the original.
FILLS = ("fill", "original", "latent noise", "latent nothing")
CLIP_SKIP, CHECKPOINT = "CLIP_stop_at_last_layers", "sd_model_checkpoint"
# Settings by the web UI's names.
THEIRS = {
    "init_img": "init_images",
    "strength": "denoising_strength",
    "scale": "cfg_scale",
    "sampler": "sampler_name",
    "schedule": "scheduler",
    "hires": "hr_scale",
    "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength",
    "variation_strength": "subseed_strength",
    "variation_seed": "subseed",
    "clip_skip": CLIP_SKIP,
}
NUMERAL = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?")
WHOLE_NUMERAL = r"[+-]?[0-9]{1,20}(\.0{1,20})?"
MOST_CLIENTS = 1024  # whose options and last job are remembered
# What the web UI's fields say where they ask for nothing that is not done here anyway.
NOTHING: dict[str, tuple[Any, ...]] = {
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "initial_noise_multiplier": (1,),
    "image_cfg_scale": (1.5,),
    "s_noise": (1,),
    "override_settings_restore_afterwards": (True,),
    "do_not_save_samples": (True,),
    "do_not_save_grid": (True,),
    "sampler_index": ("Euler",),
    "refiner_switch_at": (1,),
}


@dataclass
class Client:
    """What is remembered of a client."""

    model: str | None = None
    clip_skip: int | None = None
    jobs: list[Job] = field(default_factory=list)  # that are not over


class Clients:
    """Clients by name, those that asked last."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Client] = OrderedDict()

    def __getitem__(self, name: str) -> Client:
        found = self._known.setdefault(name, Client())
        self._known.move_to_end(name)
        if len(self._known) > MOST_CLIENTS:
            self._known.popitem(last=False)
        return found


class Fields:
    """The fields of a request as they are taken; what is left over, or `in_vain`, has no effect."""

    def __init__(self, content: Mapping[str, Any]):
        self.left = dict(content)
        self.in_vain: list[str] = []  # names of fields that were taken, and whose values have no effect

    def take(self, name: str, default: Any = None) -> Any:
        value = self.left.pop(name, None)
        return default if value is None else value

    def _numeral(self, name: str, default: float | None) -> Any:
        """A number, which the web UI also takes as a text; anything else stays as it is."""
        value = self.take(name, default)
        if isinstance(value, str) and NUMERAL.fullmatch(text := value.strip()):
            return float(text) if "." in text else int(text)
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> Any:
        value = self._numeral(name, default)
        return None if value is None else number_of(value, name, low, high)

    def whole(self, name: str, default: int | None, low: int, high: int) -> Any:
        value = self._numeral(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return None if value is None else number_of(value, name, low, high, whole=True)

    def switch(self, name: str, default: bool) -> bool:
        """A switch; the web UI takes 0 and 1, too."""
        value = self.take(name, default)
        if value not in (True, False):  # 0 and 1 are equal to these
            raise BadRequest(f"{name}: it is neither true nor false")
        return bool(value)

    def text(self, name: str, default: str = "") -> str:
        return text_of(self.take(name, default), name)

    def object(self, name: str) -> dict[str, Any]:
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise BadRequest(f"{name}: it is no object")
        return value

    def ignored(self) -> list[str]:
        """The fields that ask for something without effect, and so do not go unsaid."""

        def asks(name: str, value: Any) -> bool:
            if isinstance(value, dict) and name == "alwayson_scripts":
                return any(isinstance(one, dict) and one.get("args") for one in value.values())
            return value not in (None, False, "", 0, -1, "None", [], {}, *NOTHING.get(name, ()))

        left = [name[:80] for name, value in self.left.items() if asks(name, value)]
        return (left + self.in_vain)[:100]


@dataclass(frozen=True)
class Order:
    """A request, read: `requests` of one image each, the model, and the fields without effect."""

    requests: tuple[ImageRequest, ...]
    model: str
    batch_size: int
    send_images: bool
    subseeds: list[int]
    ignored: list[str]


def routes(service: Service) -> APIRouter:
    """The routes of the contract for a `Service`."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    clients = Clients()
    models = service.engine.models

    async def make(http: Request, from_image: bool) -> Response:
        content = await json_object(http)
        client = clients[service.client(http)]
        with in_names(names_for(content)):
            async with service.room(http):
                order = await run_in_threadpool(read_order, content, service, client, from_image)
                job = await service.submit(order.requests, http, model=order.model, preview=True)
            client.jobs.append(job)
            try:
                await service.finish(job, http)
            finally:
                client.jobs.remove(job)
        files = await service.files(job)
        for file in files:
            if file.error:
                raise file.error
        return await json_answer(reply_of, content, order, files, models)

    def image_route(path: str, schema: dict[str, Any], **facts: Any) -> Any:
        body = {"application/json": {"schema": schema}}
        return router.post(path, openapi_extra={"requestBody": {"required": True, "content": body}}, **facts)

    @image_route("/txt2img", TXT2IMG)
    async def txt2img(http: Request) -> Response:
        """Images of a prompt."""
        return await make(http, from_image=False)

    @image_route("/img2img", IMG2IMG)
    async def img2img(http: Request) -> Response:
        """Images that start from images; with a mask, only where that is white."""
        return await make(http, from_image=True)

    @router.get("/progress")
    async def progress(http: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """How far this client's own request is, and what its images look like so far."""
        jobs = clients[service.client(http)].jobs
        return progress_of(jobs[0] if jobs else None, len(jobs), skip_current_image)

    @router.post("/interrupt")
    async def interrupt(http: Request) -> dict[str, Any]:
        """Cancel this client's own requests."""
        for job in list(clients[service.client(http)].jobs):
            await run_in_threadpool(job.cancel)
        return {}

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers by the web UI's names."""
        return [
            {"name": facts.aliases[0], "aliases": [name, *facts.aliases[1:]], "options": {}}
            for name, facts in catalogue.SAMPLERS.items()
        ] + [
            {"name": a1111_guidance(name, None, True)[0], "aliases": [f"{name}_cfgpp"], "options": {}}
            for name in CFG_PP_SAMPLERS
        ]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The schedules by the web UI's names."""
        automatic = {"name": "automatic", "label": "Automatic", "aliases": None}
        known = [
            {"name": scheduler_name(name), "label": facts.a1111 or name, "aliases": [name, *facts.aliases]}
            for name, facts in catalogue.schedules().items()
        ]
        rho = {scheduler_name(name): value for name, value in catalogue.RHO.items()}
        facts = ({**one, "default_rho": rho.get(one["name"], -1.0)} for one in [automatic, *known])
        return [{**one, "need_inner_model": False} for one in facts]

    @router.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        """The models of this service."""
        return await run_in_threadpool(lambda: [model_facts(models, name) for name in models.names])

    @router.get("/options")
    async def options(http: Request) -> dict[str, Any]:
        """What this client has set, and what stays as it is."""
        client = clients[service.client(http)]
        facts = await run_in_threadpool(model_facts, models, client.model or models.default)
        own = {CHECKPOINT: facts["title"], CLIP_SKIP: client.clip_skip or 1}
        return {**own, "sd_checkpoint_hash": facts["hash"], "samples_format": "png", "sd_vae": "Automatic"}

    @image_route("/options", OPTIONS)
    async def set_options(http: Request) -> None:
        """Set `sd_model_checkpoint` and `CLIP_stop_at_last_layers` for this client's following requests.

        Other options have no effect; the log has their names.
        """
        fields = Fields(await json_object(http))
        skip, checkpoint = fields.whole(CLIP_SKIP, None, 1, 99), fields.take(CHECKPOINT, "")
        name = None if checkpoint == "" else await run_in_threadpool(model_named, models, checkpoint)
        client = clients[service.client(http)]
        client.model, client.clip_skip = name or client.model, skip or client.clip_skip
        if ignored := fields.ignored():
            http.state.facts = {"ignored": ignored}

    @image_route("/png-info", PNG_INFO)
    async def png_info(http: Request) -> dict[str, Any]:
        """The settings in an image file."""
        content = await json_object(http)
        async with service.reading:
            return await run_in_threadpool(settings_in, content, service.options.max_pixels)

    @router.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """What enlarges an image before its second pass."""
        return [{"name": "Lanczos", "model_name": None, "model_path": None, "model_url": None, "scale": 4}]

    @router.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> list[dict[str, Any]]:
        """What enlarges latents before their second pass."""
        return [{"name": "Latent"}]

    return router


# Reading


def names_for(content: Mapping[str, Any]) -> dict[str, str]:
    """The web UI's names for settings in errors, by ours."""
    sizes = [name for name in ("hr_resize_x", "hr_resize_y") if content.get(name)]
    return THEIRS | ({"hires": f"the factor by {sizes[0]}"} if sizes else {})


def read_order(content: Mapping[str, Any], service: Service, client: Client, from_image: bool) -> Order:
    """What a request's fields ask for. ServiceError."""
    options, models = service.options, service.engine.models
    fields, model = Fields(content), client.model
    override = Fields(fields.object("override_settings"))
    if (checkpoint := override.take(CHECKPOINT, "")) != "":  # empty is the current one
        model = model_named(models, checkpoint)
    model = model or models.default
    task = models.task(model)
    values = text_values(fields, override, client.clip_skip) | sampling_values(fields)
    if from_image:
        images = fields.take("init_images", [])
        if not isinstance(images, list) or not images or None in images:
            raise BadRequest("init_images: give a list of images in base64")
        values |= image_values(fields, task)
    elif task in FROM_IMAGES:
        raise BadRequest(f"the model {model} starts from images: give them to img2img as init_images")
    else:
        images = [None]
        values |= second_pass_values(fields, values, models.native_size(model))
    batch_size = fields.whole("batch_size", 1, 1, options.max_images)
    if len(images) > 1:  # each makes an image of a batch
        batch_size = max(batch_size, len(images))
    count = batch_size * fields.whole("n_iter", 1, 1, options.max_images)
    if count > options.max_images:
        raise LimitExceeded(f"batch_size x n_iter: {count} images are more than {options.max_images}")
    seeds, subseeds, strength = seeds_of(fields, count)
    if strength:
        values |= {"variation_seed": subseeds[0], "variation_strength": strength}
    fields.switch("include_init_images", False)  # which the reply looks at
    send_images = fields.switch("send_images", True)
    starts = [
        request_of(values | ({} if one is None else {"init_img": one}), options, task=task) for one in images
    ]
    made = [starts[k % batch_size % len(starts)].twin(seed=seeds[k]) for k in range(count)]
    if strength:
        made = [one.twin(variation_seed=subseed) for one, subseed in zip(made, subseeds, strict=True)]
    ignored = fields.ignored() + [f"override_settings.{name}" for name in override.ignored()]
    return Order(tuple(made), model, batch_size, send_images, subseeds, ignored)


def text_values(fields: Fields, override: Fields, clip_skip: int | None) -> dict[str, Any]:
    """The prompts, and how they are read; `clip_skip` is the client's."""
    values: dict[str, Any] = {"prompt_syntax": A1111, "long_prompts": True}
    values |= {name: fields.text(name) for name in ("prompt", "negative_prompt")}
    if (skip := override.whole(CLIP_SKIP, clip_skip, 1, 99)) not in (None, 1):
        values["clip_skip"] = skip
    return values


def sampling_values(fields: Fields) -> dict[str, Any]:
    """Size, sampler, schedule and their options."""
    values: dict[str, Any] = {
        "steps": fields.whole("steps", DEFAULT_STEPS, 1, 1000),
        "scale": fields.number("cfg_scale", DEFAULT_SCALE, -1e4, 1e4),
        "height": fields.whole("height", None, 8, 65_536),
        "width": fields.whole("width", None, 8, 65_536),
    }
    name, index = fields.take("sampler_name"), fields.take("sampler_index")
    name = text_of(name or index or DEFAULT_SAMPLER, "sampler_name")
    label = scheduler_label(text_of(fields.take("scheduler", "Automatic"), "scheduler"))
    values |= a1111_sampling(name, label)
    try:
        catalogue.resolve(values["sampler"])  # a name that nobody knows is still there
    except InputError as error:
        raise from_input_error(error) from error  # which names the fields as the web UI does
    values["scale"] = own_scale(values["scale"], values)
    has = catalogue.SAMPLERS[values["sampler"]].options
    given = {name: fields.number(name, None, 0, 1e6) for name in SAMPLER_OPTIONS}
    if not given["s_tmax"]:  # no limit
        del given["s_tmax"]
    if not given["s_churn"]:
        given = {name: value for name, value in given.items() if name in ("eta", "s_noise")}
        if "s_churn" in has:  # whose noise is that of the churn
            given.pop("s_noise")
    values |= {name: value for name, value in given.items() if name in has and value is not None}
    if fields.switch("tiling", False):
        values["tiling"] = "both"
    return values


def image_values(fields: Fields, task: str) -> dict[str, Any]:
    """What starts from an image, and of it where there is a mask; `task` is what the model does."""
    values: dict[str, Any] = {}
    strength = fields.number("denoising_strength", None, 0, 1)
    if task != "upscale":
        values["strength"] = IMAGE_STRENGTH if strength is None else strength
    elif strength is not None:  # such a model enlarges from pure noise
        fields.in_vain.append("denoising_strength")
    mode = fields.whole("resize_mode", 0, 0, len(RESIZE))
    if mode < len(RESIZE):
        values["resize"] = RESIZE[mode]
    else:
        fields.in_vain.append("resize_mode")
    mask, fill = fields.take("mask"), fields.whole("inpainting_fill", 1, 0, len(FILLS) - 1)
    blurs = {name: fields.number(name, None, 0, 256) for name in BLURS}
    padding = fields.whole("inpaint_full_res_padding", 0, 0, 4096)
    only_masked = fields.switch("inpaint_full_res", True)
    invert = fields.switch("inpainting_mask_invert", False)
    if mask is None:
        return values
    if FILLS[fill] != "original" and values.get("strength", 1) < 1:  # from pure noise none of them shows
        fields.in_vain.append("inpainting_fill")
    blur = next((each for each in blurs.values() if each is not None), MASK_BLUR)
    fields.in_vain += [name for name, each in blurs.items() if each not in (None, blur)]
    values |= {"mask": mask, "invert_mask": invert, "mask_blur": blur}
    return values | ({"crop_to_mask": padding} if only_masked else {})


def second_pass_values(fields: Fields, values: Mapping[str, Any], native: int) -> dict[str, Any]:
    """The web UI's "hires. fix"; `native` is the side in pixels of the model's own images."""
    strength = fields.number("denoising_strength", TEXT_STRENGTH, 0, 1)
    factor = fields.number("hr_scale", 2.0, 0, 16)
    upscaler = fields.text("hr_upscaler", "Latent")
    steps = fields.whole("hr_second_pass_steps", 0, 0, 1000)
    across, down = (fields.whole(name, 0, 0, 65_536) for name in ("hr_resize_x", "hr_resize_y"))
    if not fields.switch("enable_hr", False):
        return {}
    if across or down:
        factor = factor_to((across, down), (values["width"] or native, values["height"] or native))
    if not (upscaler.startswith("Latent") or upscaler == "Lanczos"):
        raise BadRequest("hr_upscaler: this service has Latent and Lanczos")
    if upscaler not in ("Latent", "Lanczos"):  # such as "Latent (antialiased)", which is plain Latent here
        fields.in_vain.append("hr_upscaler")
    ours = LANCZOS if upscaler == "Lanczos" else LATENT
    found = {"hires": factor, "hires_strength": strength, "hires_upscaler": ours}
    return found | ({"hires_steps": steps} if steps else {})


def factor_to(asked: tuple[int, int], size: tuple[int, int]) -> float:
    """The factor from a size (width, height) to the one that is asked for, of which 0 leaves a side open.

    BadRequest for a size of another ratio: the web UI would crop the enlarged image between the two passes.
    Sides are multiples of 8, so a factor that comes within 4 pixels of both gives the size.
    """
    given = [(one, side) for one, side in zip(asked, size, strict=True) if one]
    factors = [one / side for one, side in given]
    low, high = max((one - 4) / side for one, side in given), min((one + 4) / side for one, side in given)
    if low >= high:
        raise BadRequest(
            f"hr_resize_x {asked[0]} and hr_resize_y {asked[1]} have another ratio than {size[0]}x{size[1]}, "
            "and nothing is cropped here; give one of them, or width and height of their ratio"
        )
    return factors[0] if len(set(factors)) == 1 else (low + high) / 2


def seeds_of(fields: Fields, count: int) -> tuple[list[int], list[int], float]:
    """The seed and the variation seed of each image, and the variation's strength.

    Both seeds are left to chance by -1. As in the web UI, images that vary the first one's noise keep its
    seed, and their variation seeds rise.
    """
    found = [fields.whole(name, -1, -1, MAX_SEED) for name in ("seed", "subseed")]
    seed, subseed = (secrets.randbelow(2**32) if one == -1 else one for one in found)
    strength = fields.number("subseed_strength", 0.0, 0, 1)
    seeds = [image_seed(seed, 0 if strength else k) for k in range(count)]
    return seeds, [image_seed(subseed, k) for k in range(count)], strength


def scheduler_name(schedule: str) -> str:
    """The web UI's short name of a schedule: "sgm_uniform"."""
    facts = catalogue.schedules()[schedule]
    if not facts.a1111 and any(schedule == _plain(each.a1111) for each in catalogue.schedules().values()):
        return facts.aliases[0]  # the web UI has the name for another one
    return _plain(facts.a1111 or schedule)


def _plain(label: str | None) -> str:
    return (label or "").lower().replace(" ", "_")


def scheduler_label(given: str) -> str:
    """The web UI's long name of a schedule that is given by any of its names. BadRequest."""
    if given.lower() in ("", "automatic"):
        return "Automatic"
    for name, facts in catalogue.schedules().items():
        if _plain(given) == scheduler_name(name):
            return facts.a1111 or name
    try:
        found = catalogue.resolve_schedule(given)
    except InputError as error:
        raise BadRequest(f"scheduler: {error}") from error
    return catalogue.schedules()[found].a1111 or found


# Models


def model_facts(models: Any, name: str) -> dict[str, Any]:
    """A model as the web UI lists it; its hash is waited for. ServiceError."""
    reader = models.reader(name)
    try:
        digest = reader.hash.result()
    except InputError as error:
        raise from_input_error(error, models.folders) from error
    return {
        "title": f"{name} [{digest[:10]}]",
        "model_name": name,
        "hash": digest[:10],
        "sha256": None,  # of which the hash is the beginning
        "filename": PurePath(reader.files.weights).name,
        "config": PurePath(reader.files.config).name,
    }


def model_named(models: Any, given: Any) -> str:
    """The model of a title, name, file name or hash. UnknownModel."""
    text = text_of(given, CHECKPOINT)
    if text in models.names:
        return text
    known = {name: model_facts(models, name) for name in models.names}
    for name, facts in known.items():
        stem = PurePath(facts["filename"]).stem
        if text.lower() in {
            str(one).lower() for one in (facts["title"], facts["hash"], facts["filename"], stem)
        }:
            return name
    raise UnknownModel(text, models.names)


# Answering


def reply_of(
    content: Mapping[str, Any], order: Order, files: tuple[OutputFile, ...], models: Any
) -> dict[str, Any]:
    """The reply to a request: images in base64, the request's fields again, and `info`."""
    hidden = () if content.get("include_init_images") else ("init_images", "mask")
    return {
        "images": [base64_of(file.data) for file in files if order.send_images],
        "parameters": {name: None if name in hidden else value for name, value in content.items()},
        "info": json.dumps(info_of(order, files, models)),
    }


def info_of(order: Order, files: tuple[OutputFile, ...], models: Any) -> dict[str, Any]:
    """The reply's `info`: what was made, and what was ignored."""
    images = [file.image for file in files]
    prompts = [image.request.prompt for image in images]
    negatives = [image.request.negative_prompt for image in images]
    seeds = [image.seed for image in images]
    facts = model_facts(models, order.model)
    request = images[0].request
    sampler, scale = a1111_guidance(request.sampler, request.scale, request.cfg_pp)
    return {
        "prompt": prompts[0],
        "all_prompts": prompts,
        "negative_prompt": negatives[0],
        "all_negative_prompts": negatives,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": order.subseeds[0],
        "all_subseeds": order.subseeds,
        "subseed_strength": request.variation_strength or 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": sampler,
        "cfg_scale": scale,
        "steps": request.steps,
        "batch_size": order.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": facts["model_name"],
        "sd_model_hash": facts["hash"],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength if request.hires is None else request.hires_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [image_texts(image.settings)[0] for image in images],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": request.clip_skip or 1,
        "is_using_inpainting_conditioning": request.repaints,
        "version": __version__,
        "nsfw_content_detected": [bool(image.nsfw) for image in images],
        "ignored": order.ignored,
    }


def progress_of(job: Job | None, jobs: int, skip_image: bool) -> dict[str, Any]:
    """How far a job is, in the web UI's form; without one, that nothing is going on."""
    done = job.progress if job else 0.0
    running = job is not None and job.started is not None
    left = (1 - done) / done * (time.monotonic() - job.started) if running and done else 0.0
    preview = job.preview if job and not skip_image else None
    steps = job.requests[0].steps_to_run if job else 0
    return {
        "progress": done,
        "eta_relative": left,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": job.id if job else "",
            "job_count": jobs,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": math.floor(steps * done),
            "sampling_steps": steps,
        },
        "current_image": base64_of(preview) if preview else None,
        "textinfo": None if job is None or running else f"{job.position} images are ahead",
    }


def settings_in(content: Mapping[str, Any], max_pixels: int) -> dict[str, Any]:
    """The A1111 text in an image file, and what it says. ServiceError."""
    image = image_of(content.get("image"), "image", max_pixels)
    try:
        parameters, own = texts_of(image)
        found = parse_a1111(parameters) if parameters else {}
    except Exception as error:  # Pillow raises anything on damaged EXIF data
        raise BadRequest("image: the settings in it cannot be read") from error
    items = {} if own is None else {"stable-diffusion": own}
    return {"info": parameters or "", "items": items, "parameters": found}


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error as the web UI's API has it."""
    return {"error": error.code, "detail": error.message, "body": "", "errors": error.message}


# The schema

NULLABLE_TEXT = {"type": ["string", "null"]}
# As the web UI does, `Fields` takes a number as a text, too, and 0 and 1 for a switch. A pattern is for texts
# alone.
NUMBER = {"type": ["number", "string", "null"], "pattern": rf"^\s*{NUMERAL.pattern}\s*$"}
WHOLE = {"type": ["integer", "string", "null"], "pattern": rf"^\s*{WHOLE_NUMERAL}\s*$"}
SWITCH = {"enum": [True, False, 0, 1, None]}
COMMON = {
    **dict.fromkeys(("prompt", "negative_prompt", "sampler_name", "scheduler"), NULLABLE_TEXT),
    **dict.fromkeys(("seed", "subseed", "steps", "width", "height", "batch_size", "n_iter"), WHOLE),
    **dict.fromkeys(("cfg_scale", "subseed_strength", "denoising_strength"), NUMBER),
    **dict.fromkeys(("eta", "s_churn", "s_tmin", "s_tmax", "s_noise"), NUMBER),
    **dict.fromkeys(("tiling", "send_images"), SWITCH),
    "override_settings": {"type": ["object", "null"]},
}
TXT2IMG = {
    "type": "object",
    "properties": {
        **COMMON,
        "enable_hr": SWITCH,
        "hr_scale": NUMBER,
        "hr_upscaler": NULLABLE_TEXT,
        **dict.fromkeys(("hr_second_pass_steps", "hr_resize_x", "hr_resize_y"), WHOLE),
    },
}
BASE64 = {"type": "string", "contentEncoding": "base64"}
IMG2IMG = {
    "type": "object",
    "required": ["init_images"],
    "properties": {
        **COMMON,
        "init_images": {"type": "array", "minItems": 1, "items": BASE64},
        "mask": BASE64 | {"type": ["string", "null"]},
        **dict.fromkeys(("resize_mode", "inpaint_full_res_padding", "inpainting_fill"), WHOLE),
        **dict.fromkeys(BLURS, NUMBER),
        **dict.fromkeys(("inpaint_full_res", "inpainting_mask_invert", "include_init_images"), SWITCH),
    },
}
OPTIONS = {"type": "object", "properties": {CHECKPOINT: NULLABLE_TEXT, CLIP_SKIP: WHOLE}}
PNG_INFO = {"type": "object", "required": ["image"], "properties": {"image": BASE64}}
