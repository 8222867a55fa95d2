"""Further guidance as requests ask for it: images, settings, and what is refused."""

from collections.abc import Callable

import numpy as np
import pytest
from commands import Result, refused

from ldm.errors import FieldError
from ldm.pipeline import ImageRequest, Pipeline

Load, Command = Callable[..., Pipeline], Callable[..., Result]


@pytest.mark.parametrize(
    "own",
    [
        {"apg_eta": 0.0, "apg_norm": 1.0, "apg_momentum": -0.5},
        {"mimic_scale": 4.0, "threshold_percentile": 0.95},
        {"cfg_pp": True},
        {"cfg_pp": True, "scale": 1.0, "sampler": "euler_ancestral"},
    ],
)
def test_an_image_alone_is_that_of_a_batch(load: Load, own) -> None:
    pipeline = load(batch_size=2)

    def images(requests: list[ImageRequest]) -> list[np.ndarray]:
        return [image.pixels.astype(int) for image in pipeline.generate(requests)]

    requests = [ImageRequest(prompt, seed=k, steps=3, **own) for k, prompt in enumerate(("a cube", "a ball"))]
    together = images(requests)
    for k, request in enumerate(requests):
        assert np.abs(images([request])[0] - together[k]).max() <= 1
    plain = images([ImageRequest(r.prompt, seed=r.seed, steps=3, sampler=r.sampler) for r in requests])
    assert any((a != b).any() for a, b in zip(together, plain, strict=True))


def test_cfg_plus_plus_has_a_scale_of_its_own(load: Load) -> None:
    pipeline = load()
    assert pipeline.resolve(ImageRequest("a", cfg_pp=True)).scale == 0.6
    assert pipeline.resolve(ImageRequest("a")).scale == 7.5


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"apg_eta": 2}, "apg_eta: 2 is not a number in range: 0"),
        ({"apg_momentum": 1}, "apg_momentum: 1 is not a number in range"),
        ({"threshold_percentile": 0.9}, "threshold_percentile is for mimic_scale; give that, too"),
        ({"cfg_pp": True, "sampler": "heun"}, "cfg_pp with heun: CFG.. is for samplers that take Euler's"),
        ({"cfg_pp": True, "sampler": "euler", "s_churn": 4.0}, "cfg_pp with s_churn: its scales are for"),
        ({"cfg_pp": True, "scale": 7.5}, "cfg_pp with scale 7.5: its scale is 0 to 1, at most 2"),
        (
            {"mimic_scale": 3, "prompt": "a AND b", "prompt_syntax": "a1111"},
            r"mimic_scale with a prompt of several parts \(AND\)",
        ),
        (  # apg_eta was named, which was not given
            {"apg_norm": 1, "prompt": "a AND b", "prompt_syntax": "a1111"},
            r"apg_norm with a prompt of several parts \(AND\)",
        ),
    ],
)
def test_values_that_do_not_go_together(own, message) -> None:
    with pytest.raises(FieldError, match=f"^{message}"):
        ImageRequest(**{"prompt": "a"} | own)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--apg_norm -1", "--apg_norm: -1 is not a number in range: 0"),
        ("--cfg_pp --sampler heun", "--cfg_pp with heun: CFG++ is for samplers that take Euler's steps"),
        ("--mimic_scale x", "--mimic_scale: x is not a number in range"),
        (
            "--sampler euler_cfg_pp",
            "is not known: CFG++ is --cfg_pp with ddim, ddpm, euler",
        ),
    ],
)
def test_bad_input_is_one_line(command: Command, model, words, said) -> None:
    refused(command("txt2img", "--config", model[0], "--ckpt", model[1], *words.split()), said)


def test_images_without_it_keep_their_settings() -> None:
    settings = ImageRequest("a").settings()
    names = {"apg_eta", "apg_norm", "apg_momentum", "cfg_pp", "mimic_scale", "threshold_percentile"}
    assert not names & settings.keys()
    assert ImageRequest("a", apg_norm=2).settings()["apg_norm"] == 2.0


def test_what_has_no_effect_without_guidance_is_said() -> None:
    assert ImageRequest("a", scale=1.0, apg_eta=0.0).in_vain() == [
        "--apg_eta does nothing at --scale 1, which samples without guidance"
    ]
    assert ImageRequest("a", scale=1.0, cfg_pp=True, guidance_end=0.5).in_vain() == []
