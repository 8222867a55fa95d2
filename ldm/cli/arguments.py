"""From the words of a command to what the engine takes: requests, options, a pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.parser import DDIM_ETA, EXTRA_GROUPS, PROMPT, WEIGHTS, Parser, flag_of, in_flags
from ldm.cli.prompts import Line, read_prompts
from ldm.errors import InputError, ValueFieldError
from ldm.fields import Setting, listed_by_name, settings_of
from ldm.log import notice
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import MASK, ImageRequest, image_seed
from ldm.runs.options import RunOptions
from ldm.runs.processes import is_follower
from ldm.weights.description import describe
from ldm.weights.families import FAMILIES
from ldm.weights.files import check_file
from ldm.weights.loading import (
    ABLE,
    LAION_CONFIG,
    ModelFiles,
    choose_model,
    find,
    read_config,
)

if TYPE_CHECKING:
    from ldm.cli.expansion import Expansion
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.pixel_upscaler import PixelUpscaler

FLAGS_OF_THE_ORIGINAL = ("plms", "dpm_solver", "ddim_eta")
LAION_OUTDIR = {"outdir": "outputs/txt2img-samples-laion400m"}  # the original's
TEMPLATES = ("prompt_template", "negative_template")  # which are recorded, not given
WHOLE_RUN = ("rng", "fixed_code", "start_seed")  # settings that no single line can have of its own
# Where a line or a cell sets the key, the command's options in the value, other words for it, are ignored.
REPLACED = {"sampler": ("plms", "dpm_solver"), "eta": ("ddim_eta",), "ddim_eta": ("eta",)}
# Options whose empty value, as an unset shell variable leaves it, would be this folder, or no option at all.
# An empty --from-file is none, as in the original, and so is an empty --sampler.
NOT_EMPTY = (
    *("like", "wildcards", "model", "vae", "ckpt", "config", "lora_folder", "outdir"),
    *("init_img", "mask", "depth", "schedule", "hires_upscaler", "device"),
)


@dataclass(frozen=True)
class Arguments:
    """A command's arguments, checked. `values` are the request's settings as given, over those of --like."""

    given: Mapping[str, Any]
    values: Mapping[str, Any]
    parser: Parser
    run: RunOptions
    runtime: RuntimeOptions
    like: Mapping[str, Any]  # what the image of --like records; empty without one
    weights: str | None = None  # "raw" or "ema"; None is the config's choice
    sources: tuple[str, ...] = ()  # files and folders of init images, where there are several
    rounds: int = 1  # with --expand random, whose prompts differ from round to round: n_iter

    @property
    def owner(self) -> type[ImageRequest]:
        return self.parser.owner

    @cached_property
    def request(self) -> ImageRequest:
        """What the command asks for, but for the options of single lines."""
        return self.variant({})

    @cached_property
    def lines(self) -> list[Line]:
        """One round of prompts: the file's, or the command's for each of `n_samples`."""
        if self.given.get("from_file"):
            if len(self.sources) > 1 or any(map(os.path.isdir, self.sources)):
                raise InputError("--from-file with several images: give one, or an init_img in each line")
            lines = read_prompts(self.given["from_file"], self._line_options)
            times = self.given.get("repeat", 1)
        else:
            lines, times = [Line(self._text("prompt", PROMPT))], self.run.n_samples
            if self.sources:
                files, _ = self._images
                lines = [replace(lines[0], options=((self._source, file),)) for file in files]
        lines = self._paired(lines)
        if self.expansion is not None:
            general = {"negative_prompt": self._text("negative_prompt")}
            own = [{**general, **dict(line.options)}["negative_prompt"] for line in lines]
            lines = [replace(line, negative=str(text)) for line, text in zip(lines, own, strict=True)]
            lines = self.expansion.lines(lines)
        return [line for line in lines for _ in range(times)]

    def _text(self, name: str, default: str = "") -> str:
        """The command's prompt or negative prompt, before anything in it is expanded."""
        value = self.values.get(name)
        return default if value is None else value

    @cached_property
    def expansion(self) -> Expansion | None:
        """How prompts are expanded; None if they are to stay as they are."""
        mode = expand_mode(self.given)
        if mode is None:
            return None
        from ldm.cli.expansion import Expansion

        return Expansion(mode, self.given.get("wildcards"))

    @property
    def _source(self) -> str:
        """The setting that has the `sources`: without init images there may be a folder of depth maps."""
        return "init_img" if self.given.get("init_img") is not None else "depth"

    def _paired(self, lines: Sequence[Line]) -> list[Line]:
        """The lines with a mask, or depth map, of their init image's name where a folder of them is given."""
        lines = list(lines)
        for name in ("mask", "depth"):
            groups: dict[str, list[tuple[int, str]]] = {}
            for i, line in enumerate(lines):
                own = dict(line.options)
                folder, image = (own.get(key, self.values.get(key)) for key in (name, "init_img"))
                if isinstance(folder, str) and isinstance(image, str) and os.path.isdir(folder):
                    groups.setdefault(folder, []).append((i, image))
            for folder, members in groups.items():
                from ldm.cli.sources import paired_files

                files = paired_files([image for _, image in members], folder, name)
                for (i, _), file in zip(members, files, strict=True):
                    lines[i] = replace(lines[i], options=(*lines[i].options, (name, file)))
        return lines

    @cached_property
    def _images(self) -> tuple[list[str], list[str]]:
        """The files of the `sources`, and notices about them."""
        from ldm.cli.sources import image_files

        return image_files(self.sources, self.max_pixels)

    @property
    def max_pixels(self) -> int:
        return self.given.get("max_pixels", 64_000_000)

    @cached_property
    def files(self) -> ModelFiles:
        """The chosen model's files. Without a choice they are those of the bundled model that made the image
        of --like, if it does what the command is for.
        """
        if self.given.get("model"):
            return ModelFiles(Path(self.given["model"]), Path(self.given["model"]))
        config, ckpt, recorded = self.given.get("config"), self.given.get("ckpt"), self.like.get("model_hash")
        if recorded and config is None and ckpt is None:
            from ldm.weights.hashes import same_model

            able = [one.bundled for one in FAMILIES if one.bundled and one.task in ABLE[self.parser.task]]
            there = [name for name in able if find(name).exists()]
            ckpt = next((name for name in there if same_model(str(recorded), find(name))), None)
        return choose_model(config, ckpt, self.parser.task)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `model:` section of the chosen model's YAML."""
        return read_config(self.files.config)

    def check_files(self) -> None:
        """InputError if there is no checkpoint. It needs no torch."""
        if not self.given.get("model"):
            check_file(self.files.weights)

    def variant(self, own: Mapping[str, Any]) -> ImageRequest:
        """The request with other values for some settings, as users write them. FieldError."""
        left = {name for option in own for name in REPLACED.get(option, ())}
        if self.like:
            from ldm.cli.like import OVERRIDES

            replaced = {name for option in own for name in OVERRIDES.get(option, ())}
            left |= replaced.difference(self.given, WHOLE_RUN)
            if self.values.get("zero_snr") is False and "zero_snr" not in self.given and not self._is_by_this:
                left.add("zero_snr")  # another model just had none
        values = {name: value for name, value in self.values.items() if name not in left}
        values = {"prompt": PROMPT, **values, **own}
        if self.expansion is not None:  # which gives each line its plain texts
            values |= {"prompt": "", "negative_prompt": ""}
        elif "negative_prompt" in own:
            values.pop("negative_template", None)  # of the image of --like
        if values.get("init_img") is None:  # the command's defaults for init images, which lines may bring
            given = own if self.given.get("from_file") else {**self.given, **own}
            masks = [name for name, each in settings_of(self.owner).items() if each.group == MASK]
            for name in {"strength", "noise_level", *masks}.difference(given):
                values.pop(name, None)
        return self.owner(**without_original_flags(values))

    def pipeline(self) -> Pipeline | PixelUpscaler:
        """The pipeline of the chosen model; its weights are read when they are first needed."""
        if self.given.get("model"):
            from ldm.pipeline.pixel_upscaler import PixelUpscaler

            return PixelUpscaler(
                self.given["model"], self.runtime, safety=self.run.safety, max_pixels=self.max_pixels
            )
        from ldm.pipeline.pipeline import Pipeline

        return Pipeline(
            self.files,
            self.config,
            self.runtime,
            weights=self.weights,
            vae=self.given.get("vae"),
            lora_folder=self.given.get("lora_folder"),
            allow_target=self.given.get("allow_target", ()),
            safety=self.run.safety,
            max_pixels=self.max_pixels,
            expected={flag: self.given.get(flag) for flag in ("C", "f")},
        )

    def requests(self, pipeline: Pipeline) -> Iterator[ImageRequest]:
        """One round of the run's requests, resolved; a JSON line's options go over the command's.

        With --expand random these are the requests of all rounds. InputError that names the line. A notice if
        the image of --like is by another model.
        """
        found = self._images[1] if self.sources and not self.given.get("from_file") else []
        for line in [*ignored_options(self.given), *found]:
            notice(line)
        self.warn_of_another_model(pipeline)
        if self.expansion is not None and not self.expansion.changes(self.lines):
            notice("--expand: no prompt has choices such as {red|blue}, or wildcards such as __name__")
        variants = self._variants(pipeline)
        self.warn_of_other_loras(pipeline, variants.values())
        for iteration in range(self.rounds):
            before: Line | None = None
            seed: int | None = None
            for i, line in enumerate(self.lines):
                variant = variants[repr(line.options)]
                # a line that comes again has the next seed
                seed = variant.seed if line is not before or seed is None else image_seed(seed, 1)
                before = line
                request = variant.twin(prompt=line.prompt, seed=seed)
                if self.expansion is not None:
                    request = self._expanded(request, line, iteration, iteration * len(self.lines) + i)
                try:  # what depends on the prompt, which the checks of the variant did not see
                    request.check_text()
                    request.check_walk()
                    request.check_further_guidance()
                except InputError as error:
                    from ldm.cli.expansion import placed

                    raise placed(line, error) from error
                yield request

    def _expanded(self, request: ImageRequest, line: Line, iteration: int, k: int) -> ImageRequest:
        """The request of image k with plain texts: the line's, or with `random` what its own seed draws."""
        prompt_template, negative_template = line.templates
        if request.prompt_to:
            self.expansion.check_plain("prompt_to", request.prompt_to, line)
        request = request.twin(
            negative_prompt=line.negative,
            prompt_template=prompt_template,
            negative_template=negative_template,
        )
        if self.expansion.mode == "random":
            if request.seed is None:
                seed = image_seed(self.run.seed, k)
            else:  # which would rise from round to round, as that of a variation
                seed = image_seed(request.seed, iteration)
                request = request.twin(seed=seed)
                if request.variation_seed is not None:
                    request = request.twin(variation_seed=image_seed(request.variation_seed, iteration))
            request = self.expansion.draw(request, seed)
        return request

    def _variants(self, pipeline: Pipeline) -> dict[str, ImageRequest]:
        """The resolved request of each set of options that lines have. The checkpoint is read last."""
        lines: dict[str, Line] = {}  # by text: seeds 1 and 1.0 are equal, and not the same
        for line in self.lines:
            lines.setdefault(repr(line.options), line)
        found = {key: _naming(line, self._with_options, line) for key, line in lines.items()}
        for key, request in found.items():
            _naming(lines[key], pipeline.check_size, request)
        return {key: _naming(lines[key], pipeline.resolve, request) for key, request in found.items()}

    @cached_property
    def _line_options(self) -> dict[str, Setting]:
        """What a line may have of its own, under every spelling."""
        return {
            spelling: each
            for spelling, each in listed_by_name(self.owner).items()
            if each.name not in (*WHOLE_RUN, *TEMPLATES, "prompt")
            and (each.group not in EXTRA_GROUPS or each.group in self.parser.groups)
        }

    def check_inputs(self, line: Line) -> None:
        """InputError if neither the command nor a line gives what is `needed`, or one of `one_of`."""
        given = {*self.given, *self.values}
        given |= {self._line_options[name].name for name, _ in line.options if name in self._line_options}
        for name in self.parser.needed:
            if name not in given:
                raise InputError(f"{flag_of(name)} is missing, or has no value")
        if self.parser.one_of and given.isdisjoint(self.parser.one_of):
            raise InputError(f"give {' or '.join(map(flag_of, self.parser.one_of))}")

    def _with_options(self, line: Line) -> ImageRequest:
        if not line.options:
            return self.request
        known = self._line_options
        own: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for name, value in line.options:
            if name not in known and name != "ddim_eta":
                names = ", ".join(["prompt", *known, "ddim_eta"])
                raise InputError(f"no option {name!r} for a line; there are {names}")
            each = known.get(name, DDIM_ETA)
            if (first := spelled.setdefault(each.name, name)) != name:
                raise InputError(f"{first} and {name} are one option; give one of them")
            if value == "" and each.name in NOT_EMPTY:
                raise InputError(f"{name} is missing, or has no value")
            own[each.name] = str(value) if each.kind is str and isinstance(value, int | float) else value
        if self.request.rng == "compvis":
            raise InputError("options of its own with --rng compvis: that is one stream for all images")
        if own.get("seed") in (-1, "-1"):
            raise InputError("a seed of -1; leave it out, and the line has the run's")
        if "ddim_eta" in own:
            warn_of_ignored_eta({**self.values, **own})
        return self.variant(own)

    @cached_property
    def _is_by_this(self) -> bool:
        """Whether the image of --like is known to be by the chosen model, without reading all of its file."""
        from ldm.weights.hashes import known_hash

        recorded, known = str(self.like.get("model_hash") or "").lower(), known_hash(self.files.weights)
        return bool(recorded) and known is not None and known.startswith(recorded)

    def warn_of_another_model(self, pipeline: Pipeline) -> None:
        """A notice if the image of --like is by another model, as soon as the file's hash is known."""
        recorded = str(self.like.get("model_hash") or "").lower()
        maker = self.like.get("checkpoint") or "another model"

        def compare(found: str) -> None:
            if found[: len(recorded)] != recorded[: len(found)]:
                name = self.files.weights.name
                notice(f"--like: that image is by {maker} ({recorded}), this is {name}: it will differ")

        if len(recorded) == 8:
            from ldm.weights.hashes import quick_hash

            compare(quick_hash(self.files.weights))
        elif recorded:
            pipeline.hash.then(compare)

    def warn_of_other_loras(self, pipeline: Pipeline, requests: Iterable[ImageRequest]) -> None:
        """A notice if LoRAs of the image of --like have other contents, or another strength, here."""
        with_loras = [request for request in requests if self.like.get("lora_hashes") and request.loras]
        for request in with_loras:
            for line in pipeline.adapters.differences(request, self.like):
                notice(f"--like: {line}: it will differ")


def _naming(line: Line, function: Callable[..., Any], *args: Any) -> Any:
    """The function's result; its InputError names the line, if that has options."""
    try:
        return function(*args)
    except InputError as error:
        if not line.options or not line.place:
            raise
        raise InputError(f"--from-file {line.place}: {in_flags(error)}") from error


def parse(parser: Parser, argv: Sequence[str]) -> Arguments:
    """A command's arguments, all of them checked, over the settings of the image that --like names.

    Prompt file and config are read here, so that a mistake in them need not wait for torch. InputError.
    """
    given = vars(parser.parse_args(argv))
    arguments = gather(parser, given)
    with _naming_like(given):
        _check_run(arguments)
    factor = 1 if given.get("model") else describe(arguments.config).factor or 8
    with _naming_like(given):
        arguments.request.check_size(factor)
    if not is_follower():  # which get their requests from the leader
        for line in arguments.lines:
            _naming(line, arguments.check_inputs, line)
    return arguments


def gather(parser: Parser, given: Mapping[str, Any]) -> Arguments:
    """The `Arguments` of given options, of which the request is not checked yet. InputError."""
    if given.get("laion400m"):
        if "config" in given:
            raise InputError(f"--laion400m and --config {given['config']} name different models; give one")
        given = LAION_OUTDIR | given | {"config": LAION_CONFIG}
    for name in NOT_EMPTY:
        value = given.get(name)
        if value == "" or (isinstance(value, list) and "" in value):
            raise InputError(f"{flag_of(name)} is missing, or has no value")
    sources: tuple[str, ...] = ()
    if isinstance(given.get("init_img"), list):
        sources = tuple(given["init_img"])
        given = {**given, "init_img": sources[0]}
    else:
        folder = given.get("init_img") or (None if given.get("from_file") else given.get("depth"))
        if folder and os.path.isdir(folder):
            sources = (folder,)
    for name in ("ckpt", "config"):
        if given.get("model") and given.get(name):
            raise InputError(f"--model {given['model']} and --{name} are different models; give one of them")
    like: dict[str, Any] = {}
    found: dict[str, Any] = {}
    if given.get("like"):
        from ldm.cli.like import not_taken_over, read_image, settings_like

        like = read_image(given["like"], parser.owner)
        try:
            found = settings_like(like, given, parser.groups, parser.owner)
        except InputError as error:
            raise InputError(f"--like {given['like']}: {error}") from error
        if not given.get("quiet") and not is_follower():
            for line in not_taken_over(like, given):
                notice(f"--like: {line}")
    needed = [name for name in parser.needed if not given.get("from_file")]  # whose lines may bring it
    for name in ("prompt", "outdir", *parser.needed):
        if given.get(name, None if name in needed else "") is None:
            raise InputError(f"--{name.replace('_', '-')} is missing, or has no value")
    with _naming_like(given):
        defaults = dict(parser.command_defaults)
        one = {"n_samples": 1, "n_iter": 1} if given.get("like") else {}
        if sources and given.get("init_img") and parser.task != "upscale":
            one["filename"] = "{init_img}"  # the names of a folder's images stay
        if "seed" in found:
            one["seed"] = found.pop("seed")
        known = {*settings_of(parser.owner), *FLAGS_OF_THE_ORIGINAL}
        values = {**parser.request_defaults, **found, **given}
        values = {name: value for name, value in values.items() if name in known}
        values.pop("seed", None)  # the run's
        run, rounds = _options(RunOptions, {**defaults, **one, **given}), 1
        if mode := expand_mode(given):
            for name, template in (("prompt", "prompt_template"), ("negative_prompt", "negative_template")):
                values[name] = values.pop(template, None) or values.get(name)  # the image's of --like
            if mode == "random":
                run, rounds = replace(run, n_iter=1, seed=_chosen_seed(run, values)), run.n_iter
        return Arguments(
            given,
            values,
            parser,
            run,
            _options(RuntimeOptions, {**found, **given}),
            like,
            _checked(WEIGHTS, {**found, **given}.get("weights")),
            sources,
            rounds,
        )


def expand_mode(given: Mapping[str, Any]) -> str | None:
    """How choices and wildcards in prompts are expanded: random, all, or None for not at all."""
    return given.get("expand") or ("random" if given.get("wildcards") else None)


def _chosen_seed(options: RunOptions, values: Mapping[str, Any]) -> int:
    """The run's seed, chosen now if it is left to chance: prompts are drawn by it."""
    if options.seed != -1 or is_follower():
        return options.seed
    from ldm.runs.manifest import chosen_seed

    # what is recorded as it is given: the templates, and numbers
    known = {name: value for name, value in values.items() if isinstance(value, int | float)}
    templates = {"prompt_template": values.get("prompt"), "negative_template": values.get("negative_prompt")}
    known |= {name: template for name, template in templates.items() if template}
    seed, is_new = chosen_seed(options, known)
    if is_new and not options.quiet:
        notice(f"seed {seed}")
    return seed


@contextmanager
def _naming_like(given: Mapping[str, Any]) -> Iterator[None]:
    """With --like, errors say that what is wrong may have come from its image."""
    try:
        yield
    except InputError as error:
        if not given.get("like"):
            raise
        raise InputError(f"--like, or a flag that does not go with it: {in_flags(error)}") from error


def _checked(each: Setting, value: Any) -> Any:
    """The value in the type of an option that is no field; None stays None. FieldError."""
    try:
        return None if value is None else each.check(value)
    except ValueError as error:
        raise ValueFieldError(each.name, str(error)) from None


def ignored_options(given: Mapping[str, Any]) -> list[str]:
    """What a command says without any effect beside its other options, a line each."""
    lines = []
    unread = {*settings_of(ImageRequest), *FLAGS_OF_THE_ORIGINAL}
    unread -= {"init_img", "height", "width", "resize", "background", "tile", "watermark"}
    unread |= {"vae", "weights", "C", "f", "allow_target"}
    if given.get("model") and (vain := [flag_of(name) for name in given if name in unread]):
        lines.append(f"{', '.join(vain)}: a pixel upscaler (--model) has no prompt and no sampling")
    for name, vain, why in (
        ("dpm_solver", given.get("plms"), "--plms has no effect beside --dpm_solver, as in the original"),
        ("repeat", not given.get("from_file"), "--repeat is for the prompts of --from-file"),
        ("quality", given.get("format", "png") == "png", "--quality is for --format jpg and webp"),
        ("n_rows", given.get("skip_grid"), "--n_rows has no effect with --skip_grid"),
        ("filename", given.get("skip_save"), "--filename has no effect with --skip_save"),
    ):
        if name in given and vain:
            lines.append(why)
    return lines


def _options(owner: type, values: Mapping[str, Any]) -> Any:
    return owner(**{name: value for name, value in values.items() if name in settings_of(owner)})


def _check_run(arguments: Arguments) -> None:
    """What concerns the request and the run together."""
    request, size = arguments.request, arguments.runtime.batch_size
    if size is not None and (request.rng == "compvis" or request.fixed_code):
        why = "--rng compvis draws" if request.rng == "compvis" else "--fixed_code starts"
        raise InputError(f"--batch_size {size}: {why} for n_samples images at a time; leave it out")
    warn_of_ignored_eta(arguments.values)


def warn_of_ignored_eta(values: Mapping[str, Any]) -> None:
    eta = _checked(DDIM_ETA, values.get("ddim_eta"))
    if eta and values.get("dpm_solver"):
        notice(f"--ddim_eta {eta:g} does nothing with --dpm_solver, as in the original")


def without_original_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """A request's settings, --plms, --dpm_solver and --ddim_eta in their places. InputError."""
    from ldm.sampling import catalogue

    found = {name: value for name, value in values.items() if name not in FLAGS_OF_THE_ORIGINAL}
    implied = "dpmpp_2m" if values.get("dpm_solver") else "plms" if values.get("plms") else None
    if found.get("sampler") == "":  # as an empty shell variable leaves it
        del found["sampler"]
    name = _checked(settings_of(ImageRequest)["sampler"], found.get("sampler"))
    named = catalogue.resolve(name)[0] if name is not None else None
    if implied and named not in (None, implied):
        flag = "--dpm_solver" if values.get("dpm_solver") else "--plms"
        raise InputError(f"--sampler {found['sampler']} and {flag} name different samplers; give one of them")
    sampler = named or implied or "ddim"
    found.setdefault("sampler", sampler)
    ddim_eta = _checked(DDIM_ETA, values.get("ddim_eta")) or 0.0
    if ddim_eta and sampler == "plms":
        raise InputError(f"--ddim_eta {ddim_eta:g} with PLMS: its eta is always 0; use --sampler ddim")
    if ddim_eta and sampler != "ddim" and not values.get("dpm_solver"):
        raise InputError(f"--ddim_eta {ddim_eta:g} with {sampler}: it is DDIM's; there is {flag_of('eta')}")
    if ddim_eta and found.get("eta") is not None:
        raise InputError("--ddim_eta and --eta are one; give one of them")
    if sampler == "ddim" and found.get("eta") is None:
        found["eta"] = ddim_eta
    return found
