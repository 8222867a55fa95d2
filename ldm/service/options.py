"""ServiceOptions: how a service is offered, limited and recorded. Imports no torch."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import FieldError
from ldm.fields import check_fields, setting

MOST_PIXELS, LEAST_PIXELS = 4_194_304, 1_048_576  # the default limit lies between them
TIMES_NATIVE = 16  # pixels of the largest image, in those of the size that a model was trained at
FOLDERS = ("lora_folder", "embedding_folder", "control_folder")  # whose files clients may name


@dataclass(frozen=True)
class ServiceOptions:
    """Address, limits and records of a service. A host beyond this machine needs `token_file`.

    `max_pixels` is a number whether it is given or not; without it a model may have a lower limit of its own
    (`pixels_of`).
    """

    host: str = setting("127.0.0.1", "address to listen at; one beyond this machine needs --token_file")
    port: int = setting(8000, "port to listen at; 0 takes a free one", low=0, high=65_535)
    token_file: str | None = setting(
        None,
        "a file with a line NAME:TOKEN for each client; every request then needs a token",
        metavar="FILE",
    )
    queue_size: int = setting(
        64, "images that may wait; further requests are answered with 429", low=1, high=100_000, metavar="N"
    )
    deadline: float = setting(
        600.0,
        "seconds after which a request is given up, waiting included; clients may ask for less",
        low=0.01,
        high=86_400,
        metavar="SECONDS",
    )
    max_body: float = setting(
        32.0, "largest body of a request", low=0.001, high=1024, metavar="MIB", default_text="32 MiB"
    )
    max_pixels: int | None = setting(
        None,
        "most pixels of an image that comes in or goes out",
        low=64,
        high=1_000_000_000,
        metavar="N",
        default_text=f"{MOST_PIXELS:,} in; out {TIMES_NATIVE} times the pixels of the model's own size, "
        f"{LEAST_PIXELS:,} … {MOST_PIXELS:,}",
    )
    max_steps: int = setting(
        150,
        "most steps of an image, those of a second pass included, times the parts of a prompt with AND",
        low=1,
        high=2000,
        metavar="N",
    )
    max_images: int = setting(16, "most images of one request", low=1, high=1000, metavar="N")
    max_prompt: int = setting(
        10_000,
        "most characters of a prompt, and of any other text of a request",
        low=1,
        high=1_000_000,
        metavar="N",
    )
    loaded_models: int = setting(
        1,
        "models in memory at once; the one that was used longest ago makes room",
        low=1,
        high=64,
        metavar="N",
    )
    model_wait: float = setting(
        60.0,
        "most seconds for which requests for models in memory go before one whose model another has to make "
        "room for; 0: strict turns",
        low=0,
        high=86_400,
        metavar="SECONDS",
    )
    keep: str | None = setting(
        None, "keep every finished image in this folder, with its line in manifest.jsonl", metavar="FOLDER"
    )
    sign: tuple[str, ...] | None = setting(
        None,
        "sign every image with this certificate and its private key: a C2PA manifest, see docs/provenance.md",
        values=2,
        metavar="CERT.pem KEY.pem",
    )
    sign_prompt: bool = setting(False, "name the prompts in the signed manifest, too")
    log_prompts: bool = setting(False, "have prompts in the log, which leaves them out otherwise")
    log_file: str | None = setting(
        None,
        "write the log of requests, a line of JSON each, to this file",
        metavar="FILE",
        default_text="stderr",
    )
    moderate: str | None = setting(
        None,
        "ask this URL, or this Python callable (module:function), about prompts and images",
        metavar="HOOK",
    )
    moderate_deadline: float = setting(
        5.0, "seconds in which the moderation has to answer", low=0.01, high=600, metavar="SECONDS"
    )
    moderate_failure: str = setting(
        "closed",
        "what to do where the moderation does not answer: closed refuses the request, open lets it pass",
        choices=("closed", "open"),
    )
    moderate_severity: int = setting(
        4,
        "refuse from this severity on, of a URL's answer: 2 is low, 4 medium, 6 high",
        low=1,
        high=7,
        metavar="N",
    )
    drain: float = setting(
        60.0,
        "seconds in which requests may finish once the service is asked to end",
        low=0,
        high=86_400,
        metavar="SECONDS",
    )
    lora_folder: str | None = setting(None, "the folder of the LoRAs that clients may name", metavar="FOLDER")
    embedding_folder: str | None = setting(
        None, "the folder of the textual inversions that clients may name", metavar="FOLDER"
    )
    control_folder: str | None = setting(
        None, "the folder of the ControlNets that clients may name", metavar="FOLDER"
    )
    pixels_by_model: bool = field(default=False, kw_only=True, repr=False)  # nobody gave max_pixels
    offered: tuple[str, ...] = field(
        default=(), kw_only=True, repr=False
    )  # files beside those of the folders

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_pixels is None:
            object.__setattr__(self, "max_pixels", MOST_PIXELS)
            object.__setattr__(self, "pixels_by_model", True)
        if self.sign_prompt and not self.sign:
            raise FieldError("{sign_prompt} without {sign}: there is no manifest to name it in")
        if self.token_file is None and not is_loopback(self.host):
            raise FieldError(
                "{host} {given} can be reached from other machines: give {token_file}, too", given=self.host
            )
        if self.max_images > self.queue_size:
            raise FieldError(
                "{max_images} {images} is above {queue_size} {size}: such a request could never wait",
                images=self.max_images,
                size=self.queue_size,
            )

    def pixels_of(self, native_size: int) -> int:
        """Most pixels of an image by a model that was trained at `native_size` squared."""
        if not self.pixels_by_model:
            return self.max_pixels
        return min(self.max_pixels, max(LEAST_PIXELS, TIMES_NATIVE * native_size**2))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those of the service's files, of which no client need know where they are."""
        given = (*(getattr(self, name) for name in FOLDERS), self.keep)
        return tuple(Path(folder) for folder in given if folder)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body * 2**20)


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may stand for anything
        return False
