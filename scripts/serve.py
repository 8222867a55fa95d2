#!/usr/bin/env python3
"""A service for images over HTTP: AzureML's, OpenAI's and AUTOMATIC1111's contracts, and one of its own."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli.parser import serve_parser
from ldm.fields import settings_of
from ldm.pipeline.options import RuntimeOptions
from ldm.service.options import ServiceOptions

if TYPE_CHECKING:
    from ldm.service.engine import Engine

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "multipart")


def options_of(args: argparse.Namespace, owner: type) -> Any:
    """The options of a dataclass that the command line gives. FieldError."""
    return owner(**{name: value for name, value in vars(args).items() if name in settings_of(owner)})


def open_engine(
    args: argparse.Namespace, options: ServiceOptions, runtime: RuntimeOptions, signer: Any = None
) -> "Engine":
    """The engine of the models that the command line names. InputError."""
    from ldm.service.engine import Engine

    names = ("weights", "vae", "allow_target", "safety")
    choices = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Engine.open(getattr(args, "model", ()), options, runtime, signer=signer, **choices)


def main(argv: list[str] | None = None) -> int:
    args = serve_parser().parse_args(sys.argv[1:] if argv is None else argv)
    options, runtime = options_of(args, ServiceOptions), options_of(args, RuntimeOptions)
    entry.require(PACKAGES, "service")

    from ldm.images.provenance import signer_of
    from ldm.service.app import Service  # imports torch: only now, as all arguments are checked
    from ldm.service.engine import leave
    from ldm.service.server import listen, serve

    signer = signer_of(*options.sign, prompt=options.sign_prompt) if options.sign else None
    with listen(options.host, options.port) as listening:
        engine = open_engine(args, options, runtime, signer)
        service = Service(engine, options, signer=signer, debug=hasattr(args, "debug"))
        with engine:  # whose weights are read now
            code = serve(service, listening)
        return leave(engine, code)


if __name__ == "__main__":
    sys.exit(entry.run(main))
