#!/usr/bin/env python3
"""The colours of a model's latents, for --preview: a linear map, fitted to what its autoencoder decodes.

Prints the rows that ldm/images/preview.py has for the model's scale factor. A quarter of the images is kept
out of the fit, and shows how near a preview comes to the decoded image.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError

BATCH = 32
LEAST = 8  # images, of which a fit is worth anything
LARGEST_RENDER = 128  # pixels: renders have nothing to show in more


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="fit_preview.py", description="The colours of a model's latents, for --preview.")
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="the model's weights (the bundled text-to-image model's)")
    add("--config", metavar="YAML", help="its configuration (recognised by the weights)")
    add("--images", nargs="+", metavar="FILE", help="images or folders of them (rendered scenes)")
    add("--count", type=cli.number(int, LEAST, 100_000), default=512, metavar="N", help="how many (512)")
    add("--size", type=cli.number(int, 64, 4096), default=512, metavar="PIXELS", help="of their sides (512)")
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.size % 64:
        raise InputError(f"--size {args.size} is not a multiple of 64")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)

    import torch

    from ldm.images.pixels import to_float
    from ldm.images.preview import correlation, fit_factors
    from ldm.pipeline.pipeline import Pipeline
    from ldm.weights.loading import BUNDLED_WEIGHTS, choose_model

    files = choose_model(args.config, args.ckpt or (None if args.config else BUNDLED_WEIGHTS), None)
    pipeline = Pipeline.open(str(files.weights), str(files.config))
    side = min(pipeline.described.native_size, LARGEST_RENDER)
    images = own_images(args) if args.images else rendered(args.count, side)
    model = pipeline.model
    latents, pixels = [], []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            x = to_float(images[start : start + BATCH]).to(model.device)
            z = model.get_first_stage_encoding(model.encode_first_stage(x).mode())
            latents.append(z.cpu())
            pixels.append(model.decode_first_stage(z).cpu())
    z, x = torch.cat(latents), torch.cat(pixels)
    fitted = 3 * len(z) // 4
    factors = fit_factors(z[:fitted], x[:fitted]).tolist()
    near = correlation(z[fitted:], x[fitted:], factors)
    print(f"    {float(model.scale_factor):.5f}: (  # correlation {near:.3f}")
    for row in factors:
        print(f"        ({', '.join(f'{value:.4f}' for value in row)}),")
    print("    ),")
    return 0


def rendered(count: int, side: int) -> list:
    """Images of the bundled models' world, uint8 [side, side, 3], always the same."""
    import numpy as np

    from ldm.scenes.renderer import render
    from ldm.scenes.scene import random_scene

    rng = np.random.default_rng(0)
    return [render(random_scene(rng), rng, side) for _ in range(count)]


def own_images(args: argparse.Namespace) -> list:
    """The user's images, uint8 [size, size, 3]: the middle of each. InputError if they are too few."""
    import numpy as np
    from PIL import ImageOps

    from ldm.cli.sources import image_files
    from ldm.images.metadata import open_image

    files, _ = image_files(args.images, 64_000_000)
    if len(files) < LEAST:
        raise InputError(f"--images: {len(files)} images; at least {LEAST} are needed")
    found = []
    for file in files[: args.count]:
        with open_image(file) as image:
            found.append(np.asarray(ImageOps.fit(image.convert("RGB"), (args.size, args.size))))
    return found


if __name__ == "__main__":
    sys.exit(entry.run(main))
