"""The settings of an image as text, written into its file and read back; those of other tools' files, too.

One text is JSON and holds all settings under our names. The other is the one of AUTOMATIC1111's web UI, which
many tools read: the prompt, the negative prompt, and a line "Steps: 28, Sampler: Euler a, …". A setting has a
place in it if its field carries the web UI's name, `setting(…, a1111="Steps")`. Importing this module imports
neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from ldm.errors import InputError
from ldm.fields import Setting, settings_of
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import IMAGE_SETTINGS, SAMPLER_OPTIONS, ImageRequest
from ldm.pipeline.settings.adapters import a1111_loras, from_a1111_loras
from ldm.pipeline.settings.control import a1111_controls, parse_control
from ldm.pipeline.settings.guidance import CFG_PP_SAMPLERS
from ldm.pipeline.settings.passes import a1111_second_pass, second_pass
from ldm.pipeline.settings.text import A1111, EmbeddingFile
from ldm.sampling import catalogue

# by name: folders are private
FILE_SETTINGS = ("config", "checkpoint", "vae", "hires_upscaler", *IMAGE_SETTINGS)

# The web UI's order. Other names follow in the order of their fields, and the version is the last.
ORDER = (
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model"),
    *("Variation seed", "Variation seed strength", "Denoising strength"),
)
NOT_REQUESTED = {
    "Model hash": "model_hash",
    "Model": "checkpoint",
    "VAE": "vae",
    "VAE hash": "vae_hash",
    "Lora hashes": "lora_hashes",
    "Version": "version",
}  # texts, as they are
OWN_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
SIZE = "Size"  # stands for width and height
ETA_DDIM, DDIM_FAMILY = "Eta DDIM", ("ddim", "plms")  # the samplers whose eta has a name of its own
TILING, TILINGS = "Tiling", {"true": "both", "false": "none"}  # the web UI has no single axis
MERGING = "Token merging ratio"  # which is a runtime option here
HIRES_STEPS, HIRES_RESIZE = "Hires steps", "Hires resize"
NEGATIVE_PROMPT = "Negative prompt:"
AUTOMATIC = "Automatic"  # a schedule type: the sampler's own
NEAREST = "Uniform"  # stands for schedules that the web UI lacks
CFG_PP = re.compile(r"[ _]*cfg[ _]?(?:\+\+|pp)", re.IGNORECASE)  # in a sampler's name
# By what the web UI divides the CFG scale, whose usual 7.5 stands for 0.6 then
# (modules/sd_samplers_timesteps_impl.py); other samplers with CFG++ are those of its descendants.
CFG_PP_DIVISORS = {"ddim": 12.5}


class NoSettings(InputError):
    """An image file that carries no settings that we know to read."""


def image_texts(settings: Mapping[str, Any], request: type[ImageRequest] = ImageRequest) -> tuple[str, str]:
    """Settings without the user's folders, as A1111 writes them and as JSON, for `encode_image`."""
    settings = without_folders(settings)
    # A prompt typed in another encoding than UTF-8 holds lone surrogates, which JSON escapes and PNG refuses.
    parameters = a1111_parameters(settings, request).encode("utf-8", "replace").decode("utf-8")
    return parameters, json.dumps(settings)


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with files by their names alone: where they lie is nobody's business, and may change."""
    bare = {key: PurePath(settings[key]).name for key in FILE_SETTINGS if settings.get(key)}
    if settings.get("control"):
        bare["control"] = [str(parse_control(one).without_folders()) for one in settings["control"]]
    if settings.get("embedding"):
        named = map(EmbeddingFile.parse, settings["embedding"])  # whose names may have a slash, too
        bare["embedding"] = [str(one._replace(path=PurePath(one.path).name)) for one in named]
    if settings.get("lora"):
        bare["lora"] = [PurePath(one).name for one in settings["lora"]]
    return {**settings, **bare}


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The settings that we wrote into an image file, as they were when it was saved; None if it has none.

    InputError if the file, or the text that holds them, cannot be read.
    """
    from ldm.images.metadata import read_texts

    _, text = read_texts(path)
    settings = None if text is None else _parse_json(text)
    if text is not None and settings is None:
        raise InputError(f"the settings in {path} are damaged: they are no JSON object")
    return settings


def read_settings(path: str | Path, request: type[ImageRequest] = ImageRequest) -> dict[str, Any]:
    """The settings in an image file: ours if they are there and whole, else those of its A1111 text.

    InputError if it cannot be read or a value is malformed, `NoSettings` if it carries none.
    """
    from ldm.images.metadata import read_texts

    parameters, own = read_texts(path)
    if own is not None and (settings := _parse_json(own)) is not None:
        return settings
    if parameters is None or not parameters.strip():
        raise NoSettings(f"{path} carries no settings: neither this project's nor an A1111 text")
    try:
        return read_as_written(parse_a1111(parameters, request))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_as_written(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an A1111 text with how its prompts are read: by the web UI's rules, unless it is ours.

    Ours has the version as three numbers, "0.1.0", where the web UI has "v1.10.1", its descendants have
    other words and many tools have nothing, and names the syntax where it is not the plain one.
    """
    if "prompt_syntax" in settings or OWN_VERSION.fullmatch(settings.get("version", "")):
        return settings
    return {"prompt_syntax": A1111, "long_prompts": True, **settings}


def _parse_json(text: str) -> dict[str, Any] | None:
    """The object that a JSON text is, None if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _names(request: type[ImageRequest]) -> dict[str, Setting]:
    """The settings of a request class by the web UI's names."""
    return {each.a1111: each for each in settings_of(request).values() if each.a1111}


def _eta_name(sampler: str | None) -> str:
    return ETA_DDIM if sampler in DDIM_FAMILY else "Eta"


# Writing


def a1111_parameters(settings: Mapping[str, Any], request: type[ImageRequest] = ImageRequest) -> str:
    """Settings as the text that AUTOMATIC1111's web UI writes and many tools read.

    Needs prompt, width and height; any other setting that is missing or None is left out. Source:
    `create_infotext` in its modules/processing.py and `quote` in modules/infotext_utils.py.
    """
    sampler = settings.get("sampler")
    values = {name: settings.get(each.name) for name, each in _names(request).items()}
    values.setdefault(TILING, True if settings.get("tiling") == TILINGS["true"] else None)
    values.setdefault(MERGING, settings.get("tome") or None)
    values |= {name: settings.get(key) for name, key in NOT_REQUESTED.items()}
    if settings.get("hires"):
        values |= a1111_second_pass(settings)
    values["Sampler"], values["CFG scale"] = a1111_guidance(
        sampler, settings.get("scale"), bool(settings.get("cfg_pp"))
    )
    values["Schedule type"] = _schedule_type(settings)
    values[SIZE] = f"{settings['width']}x{settings['height']}"
    if checkpoint := values["Model"]:
        values["Model"] = PurePath(checkpoint).name.removesuffix(".ckpt").removesuffix(".safetensors")
    eta, version = values.pop("Eta", None), values.pop("Version")
    rest = {_eta_name(sampler): eta} | {name: value for name, value in values.items() if name not in ORDER}
    rest |= a1111_controls(settings.get("control") or (), settings.get("control_preprocess") or ())
    fields = {name: values.get(name) for name in ORDER} | rest | {"Version": version}
    lines = [settings["prompt"] + a1111_loras(settings.get("lora") or ())]
    if settings.get("negative_prompt"):
        lines.append(f"{NEGATIVE_PROMPT} {settings['negative_prompt']}")
    lines.append(
        ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    )
    return "\n".join(lines)


def _schedule_type(settings: Mapping[str, Any]) -> str | None:
    """The web UI's name of the schedule in use; None where it, too, takes that one for the sampler.

    None also of lists of timesteps or sigmas, which it does not have.
    """
    schedule, facts = settings.get("schedule"), catalogue.SAMPLERS.get(settings.get("sampler"))
    used = schedule or (facts and facts.schedule)
    known = catalogue.SCHEDULES.get(used)
    if known is None or settings.get("timesteps") or settings.get("sigmas"):
        return schedule
    if facts and used != (facts.automatic or facts.schedule):
        return known.a1111 or NEAREST
    return known.a1111 if schedule else None


def _quoted(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


# Reading

_FIELD = re.compile(r'[ \t]*(\w[\w /-]{0,60}):[ \t]*("(?:\\.|[^"\\])*"[ \t]*(?=,|$)|[^,]*)(?:,|$)')


def parse_a1111(text: str, request: type[ImageRequest] = ImageRequest) -> dict[str, Any]:
    """Settings, under our names, out of a text as `a1111_parameters`, or another tool, writes it.

    Prompt and negative prompt may have many lines; the settings are the last line that begins with one. A
    sampler's name becomes ours, and gives the schedule that it implies ("DPM++ 2M Karras"); a sampler or
    schedule that we do not have keeps its name. Where the text names no schedule, or "Automatic", it is the
    one that the web UI takes for the sampler, if that is not our default. Fields of which we know nothing
    come as text under `other`, as do options that do nothing in its sampler. InputError if the value of a
    known one is malformed.
    """
    names = _names(request)
    begins = {*names, *NOT_REQUESTED, SIZE, ETA_DDIM}
    lines = text.split("\n")
    at = next((i for i in reversed(range(len(lines))) if _first_name(lines[i]) in begins), None)
    words, fields = (lines, {}) if at is None else (lines[:at], _fields(lines[at]))
    negative = next((i for i, line in enumerate(words) if line.startswith(NEGATIVE_PROMPT)), len(words))
    other: dict[str, str] = {}
    settings: dict[str, Any] = from_a1111_loras("\n".join(words[:negative]))
    if negative < len(words):
        first = words[negative].removeprefix(NEGATIVE_PROMPT).removeprefix(" ")
        settings["negative_prompt"] = "\n".join([first, *words[negative + 1 :]])
    sampling = a1111_sampling(fields.pop("Sampler", None), fields.pop("Schedule type", None))
    # Older versions and ours wrote DDIM's eta under the common name, too.
    if "Eta" in names and _eta_name(sampling.get("sampler")) == ETA_DDIM and ETA_DDIM in fields:
        fields["Eta"] = fields.pop(ETA_DDIM)
    if _is_unlimited(fields.get("Sigma tmax")):
        del fields["Sigma tmax"]
    if fields.get(HIRES_STEPS) == "0":  # as many as in the first pass
        del fields[HIRES_STEPS]
    for name, value in fields.items():
        if name in names:
            settings[names[name].name] = _value(name, value, names[name])
        elif name == SIZE:
            settings |= _size(value)
        elif name in NOT_REQUESTED:
            settings[NOT_REQUESTED[name]] = value
        elif name == TILING and value.lower() in TILINGS:
            settings["tiling"] = TILINGS[value.lower()]
        elif name == MERGING and (share := _merged(value)) is not None:
            settings["tome"] = share
        else:
            other[name] = value
    if any(name.startswith("Hires ") for name in fields):  # the strength is the second pass's
        strength = settings.pop("strength", None)
        settings |= second_pass(settings, strength, fields.get(HIRES_RESIZE, ""))
        if "hires" in settings:
            other.pop(HIRES_RESIZE, None)
    for name in _ineffective(sampling.get("sampler"), settings):
        del settings[name]
        written = _eta_name(sampling["sampler"]) if name == "eta" else settings_of(request)[name].a1111
        other[written] = fields["Eta" if name == "eta" else written]
    if "scale" in settings:
        settings["scale"] = own_scale(settings["scale"], sampling)
    return settings | sampling | ({"other": other} if other else {})


def _merged(text: str) -> float | None:
    """The share of tokens that are merged; None for one that is too large here: the web UI's go to 0.9."""
    with suppress(ValueError):
        return settings_of(RuntimeOptions)["tome"].parse(text)
    return None


def _ineffective(sampler: str | None, settings: Mapping[str, Any]) -> list[str]:
    """The sampler's options that it lacks, or that do nothing without churn: the web UI writes them, too."""
    facts = catalogue.SAMPLERS.get(sampler)
    if facts is None:
        return []
    with_effect = set(facts.options)
    if "s_churn" in with_effect and not settings.get("s_churn"):
        with_effect = {"s_churn"}
    return [name for name in SAMPLER_OPTIONS if name in settings and name not in with_effect]


def _first_name(line: str) -> str | None:
    match = _FIELD.match(line)
    return match and match[1]


def _fields(line: str) -> dict[str, str]:
    """`name: value, …` with values in quotes where they have commas; of a name given twice the first."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(line):
        match = _FIELD.match(line, at)
        if match:
            fields.setdefault(match[1], _unquoted(match[2].strip()))
            at = match.end()
        else:
            at = (line.find(",", at) + 1) or len(line)
    return fields


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(value, strict=False))
    return value


def _value(name: str, text: str, setting: Setting) -> Any:
    """A field's text in the type of its setting; its range is the request's to check."""
    try:
        if setting.kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if setting.kind is tuple:
            return setting.parse(text)
        if setting.kind is list:
            return tuple(json.loads(text))
        value = setting.kind(text)
        if setting.kind is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        kinds = {int: "a whole number", float: "a number", bool: "True or False", tuple: "a list of numbers"}
        what = kinds[setting.kind]
        raise InputError(f"the A1111 text has {name}: {_short(text)}, which is not {what}") from None
    return value


def _size(text: str) -> dict[str, int]:
    match = re.fullmatch(r"([0-9]{1,6}) ?x ?([0-9]{1,6})", text)
    if not match:
        raise InputError(f"the A1111 text has {SIZE}: {_short(text)}, which is not WIDTHxHEIGHT")
    return {"width": int(match[1]), "height": int(match[2])}


def _is_unlimited(text: str | None) -> bool:
    """Whether "Sigma tmax" says in one of the web UI's ways that there is no limit: 0, or infinity."""
    try:
        return text is not None and float(text) in (0.0, math.inf)
    except ValueError:
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def a1111_guidance(sampler: str | None, scale: float | None, cfg_pp: bool) -> tuple[str | None, float | None]:
    """The web UI's name of our sampler, and its CFG scale. A name that we do not know stays as it is."""
    known = catalogue.SAMPLERS.get(sampler)
    name = known.aliases[0] if known else sampler
    if not cfg_pp:
        return name, scale
    return f"{name} CFG++", None if scale is None else round(scale * CFG_PP_DIVISORS.get(sampler, 1.0), 9)


def own_scale(scale: float, sampling: Mapping[str, Any]) -> float:
    """Our guidance scale for the web UI's, with what `a1111_sampling` found."""
    return scale / CFG_PP_DIVISORS.get(sampling.get("sampler"), 1.0) if sampling.get("cfg_pp") else scale


def _resolved(name: str) -> tuple[str, str | None, bool]:
    """The sampler of a name, the schedule that it implies, and whether it has CFG++. InputError."""
    plain = CFG_PP.sub("", name)
    sampler, implied = catalogue.resolve(plain)
    if plain != name and sampler not in CFG_PP_SAMPLERS:
        catalogue.resolve(name)  # the error says which samplers have it
    return sampler, implied, plain != name


def a1111_sampling(sampler: str | None, schedule: str | None) -> dict[str, Any]:
    """The web UI's names of sampler and schedule as ours. No schedule is our default.

    Where the name of the sampler has CFG++, so has what comes back, and `own_scale` is for the scale.
    """
    implied, cfg_pp = None, False
    if sampler is not None:
        with suppress(InputError):
            sampler, implied, cfg_pp = _resolved(sampler)
    facts = catalogue.SAMPLERS.get(sampler)
    if schedule is not None and schedule.lower() != AUTOMATIC.lower():
        theirs = {known.a1111: name for name, known in catalogue.SCHEDULES.items()}
        with suppress(InputError):
            schedule = theirs.get(schedule) or catalogue.resolve_schedule(schedule)
    else:
        schedule = implied
        if facts and not implied and facts.automatic != facts.schedule:
            schedule = facts.automatic
    if facts and facts.ends_only:
        schedule = None  # it has no effect in the web UI, either
    found = {"sampler": sampler, "schedule": schedule, "cfg_pp": cfg_pp or None}
    return {name: value for name, value in found.items() if value is not None}
