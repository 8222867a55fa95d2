"""Image to image: what stays of the image, and what comes of the prompt."""

import argparse

from measuring import in_fresh_process
from report import Row

from ldm.weights.loading import BUNDLED_CONFIG, ROOT


def measure_img2img(options: argparse.Namespace) -> list[Row]:
    own = "a red cube left of a blue sphere"
    other, beside = "a yellow cone on top of a green cube", "a yellow cone left of a green cube"
    same = in_fresh_process(image_to_image, f"{own} on a grey background", [0.3])
    changed = in_fresh_process(image_to_image, f"{other} on a grey background", [0.5, 0.9])
    cases = ((0.3, own, own, same), (0.5, other, beside, changed), (0.9, other, other, changed))
    return [
        Row(
            f'img2img of "{own}", strength {strength}, prompt "{prompt}", 8 seeds',
            f'"{wanted}"',
            f"{found[strength][0]:.1f} dB to the round trip, read in {found[strength][1].count(wanted)} of 8",
            found[strength][1].count(wanted) == 8,
            {"read": found[strength][1]},
        )
        for strength, prompt, wanted, found in cases
    ]


def image_to_image(prompt: str, strengths: list[float]) -> dict[float, tuple[float, list[str]]]:
    """For each strength over 8 seeds: mean PSNR in dB to the round trip, and what a detector reads."""
    import numpy as np

    from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions
    from ldm.scenes.captions import caption
    from ldm.scenes.detector import load_detector

    options = RuntimeOptions(device="cpu", eager=True, batch_size=8)
    pipeline = Pipeline.open(config=BUNDLED_CONFIG, options=options, safety="off")
    detector = load_detector(ROOT / "models/scenes-64/detector.safetensors")
    init, side = str(ROOT / "assets/init.png"), 128

    def generate(strength: float) -> np.ndarray:
        request = ImageRequest(prompt, height=side, width=side, scale=3.0, init_img=init, strength=strength)
        return np.stack([image.pixels for image in pipeline.generate([request] * 8)])

    trip, found = generate(0.0).astype(float), {}
    for strength in strengths:
        made = generate(strength)
        errors = ((made - trip) ** 2).mean(axis=(1, 2, 3))
        psnr = float((10 * np.log10(255**2 / errors)).mean())
        found[strength] = psnr, [caption(scene) for scene in detector.read(list(made))]
    return found
