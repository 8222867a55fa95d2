"""RunOptions: what a run does with its images. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.errors import FieldError
from ldm.fields import check_fields, setting
from ldm.images.names import FIELDS, check_template
from ldm.pipeline.request import DEPTH, MAX_SEED
from ldm.pipeline.settings.control import CONTROL
from ldm.runs.costs import ESTIMATED, LEAST_POWER, MEASURED, factor_of


@dataclass(frozen=True)
class RunOptions:
    """Where the images of a run go, how many there are, and how the run reports on itself."""

    outdir: str = setting("outputs", "folder for the results", group="output")
    n_iter: int = setting(1, "repeat all of it N times", low=1, metavar="N")
    n_samples: int = setting(
        1, "images of one prompt in a round, or prompts of the file sampled together", low=1, metavar="N"
    )
    seed: int = setting(42, "image k has seed SEED + k; -1 picks a seed and prints it", low=-1, high=MAX_SEED)
    resume: bool = setting(
        False, "finish an interrupted run of the same settings in --outdir", group="output"
    )
    format: str = setting("png", "of the files", choices=("png", "jpg", "webp"), group="output")
    preview: int | None = setting(
        None,
        "write what the batch in hand is going to look like into preview.png, every N steps",
        low=1,
        metavar="N",
        group="output",
    )
    quality: int = setting(95, "of jpg and webp", low=1, high=100, group="output")
    filename: str = setting(
        "{number:05}",
        f"names of the files in samples/, from {', '.join(FIELDS)}",
        metavar="TEMPLATE",
        group="output",
    )
    skip_grid: bool = setting(False, "do not save a grid", group="output")
    skip_save: bool = setting(False, "do not save single images", group="output")
    n_rows: int = setting(0, "images in a row of the grid", low=0, default_text="n_samples", group="output")
    safety: str = setting(
        "auto",
        "models/safety-checker blackens what it finds (on), only marks it (flag), is not asked (off); auto "
        "is on where it is there",
        choices=("auto", "on", "off", "flag"),
        group="output",
    )
    save_depth: bool = setting(
        False, "save the depth map of each image in depth/, as a grey image of 16 bits", group=DEPTH
    )
    save_control: bool = setting(
        False, "save what each ControlNet sees of its control image in control/", group=CONTROL
    )
    no_metadata: bool = setting(False, "do not write the settings into the images", group="output")
    sign: tuple[str, ...] | None = setting(
        None,
        "sign every image with this certificate and its private key: a C2PA manifest, see docs/provenance.md",
        values=2,
        metavar="CERT.pem KEY.pem",
        group="output",
    )
    sign_prompt: bool = setting(False, "name the prompts in the signed manifest, too", group="output")
    json: bool = setting(False, "print one JSON line per image", group="output")
    dry_run: bool = setting(
        False, "print what would be made, load no weights and write nothing", group="output"
    )
    plan: bool = setting(
        False,
        "print how long it takes, the memory, the energy and the CO2, and make nothing: as remembered from "
        "earlier runs here, or after a few steps",
        group="output",
    )
    power: float | None = setting(
        None,
        "watts of one device, for the energy that is recorded",
        low=LEAST_POWER,
        metavar="W",
        default_text="by the device's name",
        group="output",
    )
    region: str = setting(
        "world",
        "where the energy comes from, such as us-east, or its kg of CO2 per kWh",
        metavar="NAME",
        group="output",
    )
    energy: str = setting(
        ESTIMATED,
        "power x hours, or what codecarbon reads from the hardware's counters",
        choices=(ESTIMATED, MEASURED),
        group="output",
    )
    quiet: bool = setting(False, "no progress and no notices, only results and errors", group="output")
    log_file: str | None = setting(
        None, "append what happens, with its time, to this file", metavar="FILE", group="output"
    )
    devices: int | None = setting(
        None,
        "processes on this machine, one to a device",
        low=1,
        metavar="N",
        default_text="1, or the launcher's",
        group="model",
    )
    num_nodes: int | None = setting(
        None,
        "machines that work on this run together",
        low=1,
        metavar="M",
        default_text="1, or the launcher's",
        group="model",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_template(self.filename)
        factor_of(self.region)
        if self.sign_prompt and not self.sign:
            raise FieldError("{sign_prompt} without {sign}: there is no manifest to name it in")
        for other in ("resume", "dry_run"):
            if self.plan and getattr(self, other):
                raise FieldError("{plan} with {" + other + "}: it is about a whole run; give one of them")
        if self.resume and self.skip_save:
            raise FieldError("{resume} with {skip_save}: a run that saves no images cannot be taken up again")
        if self.save_control and self.skip_save:
            raise FieldError("{save_control} with {skip_save}: control images have the names of files")
        if self.save_depth and self.skip_save:
            raise FieldError("{save_depth} with {skip_save}: a depth map has the name of its image's file")
