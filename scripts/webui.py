#!/usr/bin/env python3
"""A page in the browser to make images with: works at once on the bundled models, or on linked ones."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli.parser import Parser, add_options, group_of
from ldm.fields import settings_of
from ldm.pipeline.options import RuntimeOptions
from ldm.webui.options import NOT_OF_A_PAGE, PageLimits, PageOptions

PACKAGES = ("gradio", "fastapi", "uvicorn", "prometheus_client")


def page_parser() -> Parser:
    parser = Parser(prog="webui.py", description=__doc__, argument_default=argparse.SUPPRESS)
    add_options(parser, PageOptions, title="page")
    add_options(parser, PageLimits, leave_out=NOT_OF_A_PAGE, title="page")
    group_of(parser, "model").add_argument(
        "--model",
        action="append",
        metavar="NAME=CKPT[,CONFIG]",
        help="a model and its name on the page; may be given several times (linked or bundled ones)",
    )
    add_options(parser, RuntimeOptions, defaults={"batch_size": 8})
    parser.add_argument("--safety", choices=("auto", "on", "off", "flag"), help="as of txt2img.py (auto)")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _options(owner: type, given: Mapping[str, Any]) -> Any:
    return owner(**{name: value for name, value in given.items() if name in settings_of(owner)})


def main(argv: list[str] | None = None) -> int:
    given = vars(page_parser().parse_args(sys.argv[1:] if argv is None else argv))

    page = _options(PageOptions, given)
    limits = _options(PageLimits, {name: given[name] for name in given.keys() - set(NOT_OF_A_PAGE)})
    runtime = _options(RuntimeOptions, given)

    entry.require(PACKAGES, "webui")

    from ldm.images.provenance import signer_of
    from ldm.service.engine import leave
    from ldm.webui.server import create_app, open_engine, private_folder, serve

    signer = signer_of(*limits.sign, prompt=limits.sign_prompt) if limits.sign else None
    with private_folder() as folder:
        safety = given.get("safety", "auto")
        engine, files = open_engine(given.get("model", ()), limits, runtime, signer=signer, safety=safety)
        app = create_app(engine, files, page, folder, signer=signer, debug="debug" in given)
        with engine:
            serve(app, page, lambda address: print(f"The page is at {address}", flush=True))
    return leave(engine, 0)


if __name__ == "__main__":
    sys.exit(entry.run(main))
