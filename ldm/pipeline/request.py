"""ImageRequest: everything that decides one image, written once. Imports neither torch nor numpy."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ldm.errors import FieldError
from ldm.fields import check_fields, setting, settings_of
from ldm.pipeline.settings.adapters import AdapterSettings
from ldm.pipeline.settings.control import ControlSettings
from ldm.pipeline.settings.guidance import GuidanceSettings
from ldm.pipeline.settings.passes import PassSettings
from ldm.pipeline.settings.seams import SeamSettings
from ldm.pipeline.settings.templates import TemplateSettings
from ldm.pipeline.settings.text import TextSettings
from ldm.pipeline.settings.walk import WalkSettings

MAX_SEED = 2**63 - 1
SAMPLER_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")
# Groups of settings that some commands add to those of text to image.
INIT, MASK, DEPTH, UPSCALE = "init image", "inpainting", "depth", "upscaling"
IMAGE_SETTINGS = ("init_img", "mask", "depth")  # whose values are files, or PIL images
DEFAULT_STEPS = 50


@dataclass(frozen=True)
class ImageRequest(
    WalkSettings,
    GuidanceSettings,
    SeamSettings,
    PassSettings,
    ControlSettings,
    AdapterSettings,
    TextSettings,
    TemplateSettings,
):
    """What one image is made from. A field that is None is left to the sampler, the model or the run.

    A sampler may be given by any of its names; a name that implies a schedule sets it. The fields check
    themselves: a `FieldError` names the field, what is wrong with its value and what would do instead.
    """

    prompt: str = setting("", "the text to render", group="prompt", per_image=True)
    negative_prompt: str = setting(
        "", "what to steer away from", group="prompt", metavar="TEXT", per_image=True
    )
    height: int | None = setting(
        None,
        "height in pixels, a multiple of 8",
        low=8,
        high=65_536,
        flags=("--H",),
        group="size",
        default_text="the model's, or the init image's down to a multiple of 64",
    )
    width: int | None = setting(
        None,
        "width in pixels, a multiple of 8",
        low=8,
        high=65_536,
        flags=("--W",),
        group="size",
        default_text="the model's, or the init image's down to a multiple of 64",
    )
    sampler: str = setting(
        "ddim", 'sampler by any of its names, such as "Euler a"', metavar="NAME", a1111="Sampler"
    )
    steps: int | None = setting(
        None,
        "sampling steps",
        low=1,
        high=1000,
        flags=("--ddim_steps", "--steps"),
        metavar="N",
        default_text=str(DEFAULT_STEPS),
        a1111="Steps",
    )
    scale: float | None = setting(
        None,
        "classifier-free guidance; 1 is none",
        low=-1e4,
        high=1e4,
        default_text="7.5; 5 with an init image and no mask; 9 for depth and x4 models; the config's "
        "sampling: section may say otherwise",
        a1111="CFG scale",
        per_image=True,
    )
    schedule: str | None = setting(
        None,
        "which noise levels the steps visit",
        metavar="NAME",
        default_text="the sampler's own",
        a1111="Schedule type",
    )
    rho: float | None = setting(
        None,
        "exponent of the karras and polyexponential schedules",
        low=0.1,
        high=100,
        default_text="7 and 1",
    )
    timesteps: tuple[float, ...] | None = setting(
        None, "own timesteps instead of a schedule: 999,700,400,100", low=0, high=999, metavar="LIST"
    )
    sigmas: tuple[float, ...] | None = setting(
        None,
        "own noise levels instead of a schedule, the last too: 14.6,3,0.5,0",
        low=0,
        high=1e5,
        metavar="LIST",
    )
    zero_snr: bool | None = setting(
        None,
        "rescale a v-prediction model's noise schedule to zero terminal SNR",
        default_text="what the checkpoint says",
    )
    eta: float | None = setting(
        None,
        "noise of any sampler that has it, 0 to 1",
        low=0,
        high=1,
        default_text="the sampler's",
        a1111="Eta",
    )
    s_churn: float | None = setting(
        None,
        "noise that euler, heun and dpm_2 add over the run",
        low=0,
        default_text="0",
        a1111="Sigma churn",
    )
    s_tmin: float | None = setting(
        None, "churn at sigmas from this one on", low=0, default_text="0", a1111="Sigma tmin"
    )
    s_tmax: float | None = setting(
        None, "churn at sigmas up to this one", low=0, default_text="∞", a1111="Sigma tmax"
    )
    s_noise: float | None = setting(
        None,
        "factor on the noise of the steps",
        low=0,
        high=10,
        default_text="1",
        a1111="Sigma noise",
    )
    cfg_rescale: float = setting(
        0.0, "against the overexposure of large scales; 0.7 is common", low=0, high=1, metavar="PHI"
    )
    guidance_start: float = setting(0.0, "guide from this share of the steps", low=0, high=1)
    guidance_end: float = setting(
        1.0, "guide up to this share of the steps; the others cost half", low=0, high=1
    )
    seed: int | None = setting(
        None,
        "seed of the image's noise",
        low=0,
        high=MAX_SEED,
        default_text="the run's seed plus the image's number",
        a1111="Seed",
        per_image=True,
    )
    variation_seed: int | None = setting(
        None,
        "vary towards this seed's noise; image k of a run towards that of SEED + k",
        low=0,
        high=MAX_SEED,
        metavar="SEED",
        a1111="Variation seed",
        per_image=True,
    )
    variation_strength: float | None = setting(
        None,
        "how far, 0 to 1",
        low=0,
        high=1,
        metavar="T",
        a1111="Variation seed strength",
        per_image=True,
    )
    fixed_code: bool = setting(False, "start every batch from the same noise", per_image=True)
    start_seed: int | None = setting(
        None,
        "with --fixed_code: start from this seed's noise",
        low=0,
        high=MAX_SEED,
        metavar="SEED",
        default_text="the run's seed",
        per_image=True,
    )
    rng: str = setting(
        "image",
        "image: every image has a noise stream of its own; compvis: the original's one stream",
        choices=("image", "compvis"),
    )
    init_img: Any = setting(  # a file, or a PIL image
        None,
        "the image to start from",
        flags=("--init-img",),
        metavar="FILE",
        group=INIT,
        per_image=True,
        takes_objects=True,
    )
    strength: float | None = setting(
        None,
        "share of the steps that run: 0 gives the image back, 1 ignores it",
        low=0,
        high=1,
        group=INIT,
        default_text="0.75",
        a1111="Denoising strength",
    )
    resize: str = setting(
        "stretch",
        "how the init image is fitted to the size",
        choices=("stretch", "crop", "pad"),
        group=INIT,
        per_image=True,
    )
    background: str = setting(
        "white",
        "behind transparency, and the padding",
        metavar="COLOUR",
        group=INIT,
        per_image=True,
    )
    mask: Any = setting(
        None,
        "an image that is white where the init image is to be painted anew",
        metavar="FILE",
        group=MASK,
        per_image=True,
        takes_objects=True,
    )
    mask_blur: float = setting(
        4.0,
        "standard deviation in pixels of the blur that softens the mask's edge where the result is pasted",
        low=0,
        high=256,
        group=MASK,
        metavar="PIXELS",
        a1111="Mask blur",
        per_image=True,
    )
    invert_mask: bool = setting(False, "paint anew what is black", group=MASK, per_image=True)
    crop_to_mask: int | None = setting(
        None,
        "work on the mask and this many pixels around it alone, at full resolution, and paste them back",
        low=0,
        high=4096,
        group=MASK,
        metavar="PADDING",
        a1111="Masked area padding",
        per_image=True,
    )
    outpaint: tuple[float, ...] | None = setting(
        None,
        "add this many pixels on each side and paint them: LEFT,TOP,RIGHT,BOTTOM",
        low=0,
        high=8192,
        group=MASK,
        metavar="LIST",
        per_image=True,
    )
    soft: bool = setting(
        False,
        "greys of the mask are strengths: each pixel joins the denoising at a step of its own",
        group=MASK,
        per_image=True,
    )
    depth: Any = setting(
        None,
        "a depth map, brighter is nearer",
        metavar="MAP",
        group=DEPTH,
        default_text="estimated from the init image",
        per_image=True,
        takes_objects=True,
    )
    noise_level: int | None = setting(
        None,
        "noise on the image that is enlarged, up to 350 for x4 models: more of it leaves more to the model",
        low=0,
        high=999,
        group=UPSCALE,
        default_text="20",
        per_image=True,
    )
    tile: int | None = setting(
        None,
        "side in pixels of the overlapping parts of the image that are enlarged at a time, at least 16; "
        "0: no tiles",
        low=0,
        high=8192,
        group=UPSCALE,
        metavar="PIXELS",
        default_text="by the memory of the GPU, or of the machine, as a whole",
    )
    watermark: str = setting(
        "StableDiffusionV1",
        "invisible watermark on images of at least 256x256 pixels, or none",
        metavar="TEXT",
        group="output",
        per_image=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_images()
        self._check_sampler()
        self._check_levels()
        self._check_guidance()
        self._check_seeds()
        self._check_init_image()
        self._check_mask()
        self._check_colours()
        self.check_text()
        self.check_walk()
        self.check_adapters()
        self.check_control()
        self.check_passes()
        self.check_seams()
        self.check_further_guidance()

    def _check_images(self) -> None:
        """Files by name, or PIL images, which all have this method; an array has no modes, nor a name."""
        for name in IMAGE_SETTINGS:
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or hasattr(value, "getexif")):
                raise FieldError(
                    "{" + name + "} is an object of type {type}: give a file's name or a PIL image",
                    type=type(value).__name__,
                )

    def _check_sampler(self) -> None:
        from ldm.sampling import catalogue

        sampler, implied = catalogue.resolve(self.sampler)
        schedule = None if self.schedule is None else catalogue.resolve_schedule(self.schedule)
        if implied and schedule not in (None, implied):
            raise FieldError(
                "{sampler} implies the {implied} schedule and {schedule} is {given}; give one of them",
                implied=implied,
                given=schedule,
            )
        self._set(sampler=sampler, schedule=schedule or implied)
        allowed = catalogue.SAMPLERS[sampler].options
        if self.s_churn == 0 and "s_churn" not in allowed:  # which takes no option, and adds none anyway
            self._set(s_churn=None)
        given = {name: getattr(self, name) for name in SAMPLER_OPTIONS if getattr(self, name) is not None}
        if given.get("s_churn") == 0:  # as where it is not given
            del given["s_churn"]
        for name, value in given.items():
            if name not in allowed:
                having = ", ".join(n for n, facts in catalogue.SAMPLERS.items() if name in facts.options)
                raise FieldError(
                    "{" + name + "} {value:g}: {which} has no such option; it is one of {having}",
                    value=value,
                    which=sampler,
                    having=having,
                )
        if "s_churn" in allowed and given and not given.get("s_churn"):
            first = min(given)
            raise FieldError("{" + first + "} without {s_churn}: {which} adds no noise", which=sampler)
        if given.get("s_tmin", 0) > given.get("s_tmax", math.inf):
            raise FieldError(
                "{s_tmin} {low:g} is above {s_tmax} {high:g}", low=given["s_tmin"], high=given["s_tmax"]
            )

    def _check_levels(self) -> None:
        """Schedule or lists; sets `steps`, and `schedule` where zero SNR needs its own."""
        from ldm.sampling import catalogue

        lists = [name for name in ("timesteps", "sigmas") if getattr(self, name) is not None]
        if len(lists) + (self.schedule is not None) > 1:
            names = " and ".join(f"{{{name}}}" for name in [*(["schedule"] if self.schedule else []), *lists])
            raise FieldError(f"{names} all say which noise levels to visit; give one of them")
        _check_falling("timesteps", self.timesteps, 1)
        _check_falling("sigmas", self.sigmas, 2)
        if lists and catalogue.uses_ends_only(self.sampler):
            raise FieldError(
                "{"
                + lists[0]
                + "} with {which}: it chooses its own noise levels between the first and the last; "
                "leave the list out, or take another {sampler}",
                which=self.sampler,
            )
        if self.zero_snr and not self.schedule and not lists:
            self._set(schedule="trailing")  # visits the last timestep, which the rescaling is for
        if self.rho is not None and self.schedule not in catalogue.RHO:
            raise FieldError(
                "{rho} {value:g} is for {schedule} {which}",
                value=self.rho,
                which=" or ".join(catalogue.RHO),
            )
        if lists:
            steps = len(self.timesteps) if self.timesteps else len(self.sigmas) - 1
            if self.steps not in (None, steps):
                raise FieldError(
                    "{steps} {given}, but {" + lists[0] + "} makes {made} steps; give one",
                    given=self.steps,
                    made=steps,
                )
            self._set(steps=steps)
        elif self.steps is None:
            self._set(steps=DEFAULT_STEPS)

    def _check_guidance(self) -> None:
        if self.guidance_start >= self.guidance_end:
            raise FieldError(
                "{guidance_start} {start:g} is not below {guidance_end} {end:g}; {scale} 1 samples without "
                "guidance",
                start=self.guidance_start,
                end=self.guidance_end,
            )

    def _check_seeds(self) -> None:
        if (self.variation_seed is None) != (self.variation_strength is None):
            given, lacking = "variation_strength", "variation_seed"
            if self.variation_strength is None:
                given, lacking = lacking, given
            raise FieldError("{" + given + "} needs a {" + lacking + "}, too")
        if self.variation_seed is not None and self.rng == "compvis":
            raise FieldError(
                "{variation_seed} is for {rng} image: in the original's one stream no image has a seed"
            )
        if self.start_seed is not None and (not self.fixed_code or self.rng == "compvis"):
            raise FieldError("{start_seed} {seed} is for {fixed_code} with {rng} image", seed=self.start_seed)

    def _check_init_image(self) -> None:
        if self.init_img is None:
            for name in ("strength", "mask", "outpaint", "noise_level"):
                if (value := getattr(self, name)) is not None:
                    shown = f" {value:g}" if isinstance(value, int | float) else ""
                    raise FieldError("{" + name + "}" + shown + " without {init_img}")
        elif self.noise_level is not None:
            if self.strength is not None:
                raise FieldError("{strength} with {noise_level}: an image is enlarged from pure noise")
        elif self.strength is None:
            raise FieldError("{init_img} without {strength}, the share of the steps to run, 0 … 1")
        conditions = [name for name in ("mask", "outpaint", "depth", "noise_level") if self._has(name)]
        if conditions and self.rng == "compvis":
            raise FieldError("{" + conditions[0] + "} is for {rng} image: the original had no stream for it")
        if len(conditions) > 1 and conditions != ["mask", "outpaint"]:
            raise FieldError("{" + conditions[0] + "} and {" + conditions[-1] + "} are for different models")

    def _check_mask(self) -> None:
        if not self.repaints:
            for name in ("invert_mask", "crop_to_mask", "soft"):
                if self._has(name):
                    raise FieldError("{" + name + "} without {mask}")
        if self.outpaint is not None:
            sides = tuple(int(side) for side in self.outpaint)
            if len(sides) != 4 or sides != self.outpaint or not any(sides):
                given = ",".join(f"{side:g}" for side in self.outpaint)
                raise FieldError(
                    "{outpaint} {given}: give four whole numbers LEFT,TOP,RIGHT,BOTTOM, one above 0",
                    given=given,
                )
        if self.invert_mask and self.mask is None:
            raise FieldError("{invert_mask} without {mask}")

    def _has(self, name: str) -> bool:
        """Whether a setting is given that is off by default."""
        value = getattr(self, name)
        return value is not None and value is not False  # 0 is a value, and equals False

    @property
    def repaints(self) -> bool:
        """Whether a part of the init image is to be painted anew, and the rest to be kept."""
        return self.mask is not None or self.outpaint is not None

    def _check_colours(self) -> None:
        """Values that only the image code understands, so that they do not wait for an image."""
        if not self.watermark:
            raise FieldError("the watermark's message is empty; give one, or use {watermark} none")
        if self.background != "white":
            from ldm.images.init_image import parse_colour

            parse_colour(self.background)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def check_size(self, factor: int) -> None:
        """FieldError unless height and width, where they are given, are multiples of a model's factor."""
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and size % factor:
                raise FieldError(
                    "{" + name + "} {size} is not a multiple of {factor}; the nearest is {nearest}",
                    size=size,
                    factor=factor,
                    nearest=max(factor, round(size / factor) * factor),
                )

    @property
    def options(self) -> dict[str, float]:
        """The sampler's own options, as far as they are given."""
        given = {name: getattr(self, name) for name in SAMPLER_OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def steps_to_run(self) -> int:
        """All steps of text to image; of image to image strength x steps, rounded down: 29 for 0.29 x 100."""
        return self.steps if self.strength is None else int(round(self.strength * self.steps, 6))

    def twin(self, **values: Any) -> ImageRequest:
        """The same request with other values, such as seeds, that need no check.

        `dataclasses.replace` would check all fields again, for each of a run's thousands of images.
        """
        twin = copy.copy(self)
        twin._set(**values)
        return twin

    def batch_key(self) -> tuple:
        """What images that are sampled together must agree in: guidance too, which doubles the batch."""
        shared = [getattr(self, name) for name, each in settings_of(type(self)).items() if not each.per_image]
        conditions = [getattr(self, name) is None for name in IMAGE_SETTINGS]
        conditions += [self.repaints, self.noise_level is None, self.control_key(), self.parts]
        switching = self.switching() if self.rng == "image" else ()  # one stream is for all prompts
        return (*shared, self.loras, self.scale == 1.0, *conditions, switching)

    def in_vain(self) -> list[str]:
        """What the request says without any effect, a line each; `scale` has to be known."""
        from ldm.sampling import catalogue

        found = self.text_notices()
        if not self.guided:
            guidance = ["cfg_rescale", "guidance_start", "guidance_end"]
            guidance += ["apg_eta", "apg_norm", "apg_momentum", "mimic_scale"]
            if not self.parts:  # of which each is guided away from the negative prompt
                guidance.insert(0, "negative_prompt")
            defaults = settings_of(type(self))
            for name in guidance:
                if getattr(self, name) != defaults[name].default:
                    found.append(f"--{name} does nothing at --scale 1, which samples without guidance")
        options = catalogue.SAMPLERS[self.sampler].options | self.options
        if "s_noise" in self.options and options.get("eta") == 0:
            found.append(f"--s_noise {self.s_noise:g} does nothing at --eta 0, which adds no noise")
        if (
            catalogue.SAMPLERS[self.sampler].adaptive
            and self.steps != DEFAULT_STEPS
            and self.strength is None
        ):
            found.append(f"--steps {self.steps}: {self.sampler} chooses their number itself")
        if self.schedule and catalogue.uses_ends_only(self.sampler) and not self.zero_snr:
            found.append(
                f"--schedule {self.schedule}: {self.sampler} takes its first and last noise level alone"
            )
        return found

    def settings(self) -> dict[str, Any]:
        """The settings in use by name, as they are written into image files and the manifest."""
        found = {}
        for name, each in settings_of(type(self)).items():
            value = getattr(self, name)
            if value is None or (each.group == INIT and self.init_img is None):
                continue
            if value == each.default and not each.recorded:
                continue
            if each.group == MASK and not self.repaints:
                continue
            found[name] = image_name(value) if name in IMAGE_SETTINGS else value
        if self.control:
            found["control"] = tuple(map(str, self.control))
        return found


def image_name(image: Any) -> str:
    """The name by which an init image, a mask or a depth map is recorded."""
    return image if isinstance(image, str) else str(getattr(image, "filename", "") or "image")


def image_seed(seed: int, k: int) -> int:
    """The seed of image k of a run."""
    return (seed + k) % (MAX_SEED + 1)


def _check_falling(name: str, values: tuple[float, ...] | None, least: int) -> None:
    """FieldError unless each number is below the one before."""
    for value, following in pairwise(values or ()):
        if following >= value:
            raise FieldError(
                "{" + name + "}: the list must fall, but {following:g} comes after {value:g}",
                following=following,
                value=value,
            )
    if values is not None and len(values) < least:
        given = ",".join(f"{value:g}" for value in values)
        raise FieldError(
            "{" + name + "} {given!r}: at least {least} numbers are needed, separated by commas",
            given=given,
            least=least,
        )
