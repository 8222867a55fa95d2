"""The API of AUTOMATIC1111's web UI, by one of its client libraries against a real server."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest
import tiny
import webuiapi
from live_service import base64_png, live, pixels
from PIL import Image
from tiny_siblings import write_model

from ldm.pipeline.infotext import a1111_sampling
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.sampling import catalogue
from ldm.service.a1111 import (
    IMG2IMG,
    NUMBER,
    SWITCH,
    TXT2IMG,
    WHOLE,
    Fields,
    scheduler_label,
    scheduler_name,
)
from ldm.service.engine import Engine
from ldm.service.errors import BadRequest

SIZE = {"width": 16, "height": 16, "steps": 2}
READING = {"prompt_syntax": "a1111", "long_prompts": True}


@pytest.fixture(scope="module")
def served(model: tuple[Path, Path]) -> Iterator[tuple[str, Engine]]:
    with live(model, ("tiny", "twin"), max_images=4, max_steps=1000, loaded_models=2) as served:
        yield served


@pytest.fixture(scope="module")
def url(served: tuple[str, Engine]) -> str:
    return f"{served[0]}/sdapi/v1"


@pytest.fixture
def client(url: str) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=url)


@pytest.fixture(scope="module")
def reference(model: tuple[Path, Path]) -> Pipeline:
    return Pipeline.load(str(model[1]), str(model[0]), safety="off")


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/{path}", json=body, timeout=600)


def distance(image: Image.Image, pixels: np.ndarray) -> int:
    return int(np.abs(np.asarray(image).astype(int) - pixels).max())


def test_txt2img(client: webuiapi.WebUIApi, reference: Pipeline) -> None:
    """The client sends every field that the web UI knows; the prompt is read by its rules."""
    found = client.txt2img(
        prompt="a (cat:1.3)", negative_prompt="dog", seed=5, batch_size=2, n_iter=2, **SIZE
    )
    wanted = reference.generate(
        [
            ImageRequest("a (cat:1.3)", "dog", seed=seed, steps=2, scale=7.0, sampler="Euler a", **READING)
            for seed in (5, 6, 7, 8)
        ]
    )
    for image, same in zip(found.images, wanted, strict=True):
        assert distance(image, same.pixels) <= 1
    assert found.info["all_seeds"] == [5, 6, 7, 8]
    assert (found.info["sampler_name"], found.info["steps"], found.info["batch_size"]) == ("Euler a", 2, 2)
    assert found.info["ignored"] == []
    assert found.info["infotexts"][1].startswith(
        "a (cat:1.3)\nNegative prompt: dog\nSteps: 2, Sampler: Euler a"
    )
    assert found.parameters["cfg_scale"] == 7.0


@pytest.mark.parametrize(
    ("name", "scheduler", "sampler", "schedule"),
    [
        ("DPM++ 2M", None, "dpmpp_2m", "karras"),  # what "Automatic" is for it there
        ("DPM++ 2M Karras", None, "dpmpp_2m", "karras"),
        ("k_dpmpp_2m", "exponential", "dpmpp_2m", "exponential"),
        ("Euler", "Karras", "euler", "karras"),
        ("Euler", "uniform", "euler", "linspace"),
        ("Euler", "sgm_uniform", "euler", "sgm_uniform"),
        ("Euler", "Align Your Steps", "euler", "ays"),
        ("EulerDiscreteScheduler", "automatic", "euler", None),
        (None, None, "euler", None),
    ],
)
def test_samplers_and_schedules_by_their_names_there(
    url: str, name: str | None, scheduler: str | None, sampler: str, schedule: str | None
) -> None:
    body = {"prompt": "a cat", "sampler_name": name, "scheduler": scheduler, "seed": 3, **SIZE}
    found = post(url, "txt2img", **body)
    assert found.status_code == 200, found.text
    info = json.loads(found.json()["info"])
    assert info["sampler_name"] == catalogue.SAMPLERS[sampler].aliases[0]
    settings = post(url, "png-info", image=found.json()["images"][0]).json()["items"]["stable-diffusion"]
    assert json.loads(settings).get("schedule") == schedule


def test_every_schedule_has_a_name_of_its_own(client: webuiapi.WebUIApi) -> None:
    listed = client.get_schedulers()
    names = [one["name"] for one in listed]
    assert len(set(names)) == len(names) == len(catalogue.schedules()) + 1
    for schedule in catalogue.schedules():
        assert scheduler_name(schedule) in names
        assert a1111_sampling("Euler", scheduler_label(scheduler_name(schedule)))["schedule"] == schedule
    assert {"Euler a", "DPM++ 2M"} <= set(client.util_get_sampler_names())
    with pytest.raises(BadRequest, match="turbo is not known"):
        scheduler_label("turbo")


def test_the_options_of_samplers(url: str, reference: Pipeline) -> None:
    """webuiapi sends eta 1 for all: only some samplers have it. 0 is no limit to s_tmax."""
    own = {"eta": 0.5, "s_churn": 0.3, "s_tmin": 0.1, "s_tmax": 0, "s_noise": 1.01}
    for sampler, used in (("DDIM", ("eta",)), ("Heun", ("s_churn", "s_tmin", "s_noise")), ("PLMS", ())):
        found = post(url, "txt2img", prompt="a cat", sampler_name=sampler, seed=3, cfg_scale=3, **own, **SIZE)
        assert found.status_code == 200, found.text
        values = {name: own[name] for name in used}
        request = ImageRequest("a cat", seed=3, steps=2, scale=3.0, sampler=sampler, **values, **READING)
        (same,) = reference.generate([request])
        assert np.abs(pixels(found.json()["images"][0]) - same.pixels).max() <= 1


def test_cfg_pp_by_the_web_uis_name(url: str, reference: Pipeline) -> None:
    """It was refused as a sampler that nobody knows, with a message in which "sampler_name" stood for all
    settings. The web UI divides the scale of its sampler by 12.5.
    """
    body = {"prompt": "a cat", "sampler_name": "DDIM CFG++", "cfg_scale": 7.5, "seed": 3, **SIZE}
    found = post(url, "txt2img", **body).json()
    info = json.loads(found["info"])
    assert (info["sampler_name"], info["cfg_scale"]) == ("DDIM CFG++", 7.5)
    assert "Sampler: DDIM CFG++, CFG scale: 7.5," in info["infotexts"][0]
    values = {"sampler": "ddim", "cfg_pp": True, "scale": 0.6, "seed": 3, "steps": 2}
    (same,) = reference.generate([ImageRequest("a cat", **values, **READING)])
    assert np.abs(pixels(found["images"][0]) - same.pixels).max() <= 1
    detail = post(url, "txt2img", **body | {"sampler_name": "DPM++ 2M CFG++"}).json()["detail"]
    assert detail.startswith("sampler_name DPM++ 2M CFG++ is not known: CFG++ is cfg_pp with ddim, ddpm,")


def test_numbers_may_be_texts(url: str) -> None:
    """As the web UI takes them; they were refused as no numbers."""
    texts = {"steps": "2", "seed": "-1", "cfg_scale": "3.5", "width": "16", "height": "24.0", "n_iter": " 1 "}
    info = json.loads(post(url, "txt2img", prompt="a cat", **texts).json()["info"])
    assert (info["steps"], info["cfg_scale"], info["width"], info["height"]) == (2, 3.5, 16, 24)
    seed = post(url, "txt2img", prompt="a cat", **texts | {"seed": "\u001c1"}).json()["info"]
    assert json.loads(seed)["seed"] == 1  # which str.strip takes for a space, and int does not
    refused = post(url, "txt2img", prompt="a cat", steps="2x").json()
    assert refused["detail"].startswith("steps: it is no whole number")


def test_an_empty_checkpoint_is_the_current_one(url: str) -> None:
    """It was a model that nobody knows."""
    own = {"override_settings": {"sd_model_checkpoint": ""}}
    assert post(url, "txt2img", prompt="a cat", **own, **SIZE).status_code == 200
    assert post(url, "options", sd_model_checkpoint="").status_code == 200


def test_variations(url: str, reference: Pipeline) -> None:
    found = post(
        url, "txt2img", prompt="a", seed=3, subseed=9, subseed_strength=0.4, batch_size=2, **SIZE
    ).json()
    info = json.loads(found["info"])
    assert (info["all_seeds"], info["all_subseeds"]) == ([3, 3], [9, 10])
    values = {"seed": 3, "steps": 2, "scale": 7.0, "sampler": "euler", "variation_strength": 0.4, **READING}
    wanted = reference.generate([ImageRequest("a", variation_seed=subseed, **values) for subseed in (9, 10)])
    for image, same in zip(found["images"], wanted, strict=True):
        assert np.abs(pixels(image) - same.pixels).max() <= 1


def test_the_second_pass(client: webuiapi.WebUIApi) -> None:
    found = client.txt2img(
        prompt="a", enable_hr=True, hr_scale=2, hr_upscaler="Latent", hr_second_pass_steps=3, **SIZE
    )
    assert found.image.size == (32, 32)
    assert found.info["denoising_strength"] == 0.7
    found = client.txt2img(prompt="a", enable_hr=True, hr_resize_x=48, hr_upscaler="Lanczos", **SIZE)
    assert found.image.size == (48, 48)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"hr_resize_x": 32, "hr_resize_y": 64}, (32, 64)),
        ({"hr_resize_x": 24}, (24, 48)),
        ({"hr_resize_y": 48}, (24, 48)),
        ({"hr_resize_x": 28, "hr_resize_y": 60}, (32, 64)),  # multiples of 8, one factor for both sides
    ],
)
def test_a_second_pass_of_a_given_size(url: str, asked: dict[str, int], size: tuple[int, int]) -> None:
    body = {"prompt": "a", "enable_hr": True, "width": 16, "height": 32, "steps": 1, **asked}
    answer = post(url, "txt2img", **body).json()
    assert pixels(answer["images"][0]).shape[1::-1] == size
    assert json.loads(answer["info"])["ignored"] == []


def test_a_size_alone_is_that_of_the_models_own_images(url: str) -> None:
    """Without width and height hr_resize_x had no effect: the image was twice the model's."""
    answer = post(url, "txt2img", prompt="a", enable_hr=True, hr_resize_x=48, steps=1).json()
    assert pixels(answer["images"][0]).shape == (48, 48, 3)


@pytest.mark.parametrize("asked", [(32, 48), (48, 32), (8, 48)])
def test_a_second_pass_of_another_ratio_is_refused(url: str, asked: tuple[int, int]) -> None:
    """The image had the ratio of the first pass, at the width that was asked for, and nothing said so."""
    across, down = asked
    answer = post(url, "txt2img", prompt="a", enable_hr=True, hr_resize_x=across, hr_resize_y=down, **SIZE)
    assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")
    words = f"hr_resize_x {across} and hr_resize_y {down} have another ratio than 16x16"
    assert answer.json()["detail"].startswith(words)
    plain = {"hr_resize_x": across, "hr_resize_y": down, "enable_hr": False}
    assert post(url, "txt2img", prompt="a", **plain, **SIZE).status_code == 200  # as without a second pass


@pytest.mark.parametrize(
    ("blurs", "recorded", "ignored"),
    [
        ({"mask_blur_x": 0, "mask_blur_y": 32}, 0, ["mask_blur_y"]),
        ({"mask_blur": 4, "mask_blur_x": 0, "mask_blur_y": 4}, 4, ["mask_blur_x"]),
        ({"mask_blur_x": 6, "mask_blur_y": 6}, 6, []),
        ({"mask_blur_y": 6}, 6, []),
        ({}, 4, []),
    ],
)
def test_a_blur_without_effect_is_named(
    url: str, blurs: dict[str, int], recorded: int, ignored: list[str]
) -> None:
    """Of blurs that differ only the first had an effect, and the other was not listed."""
    image = base64_png(Image.new("RGB", (64, 64), "red"))
    mask = base64_png(Image.new("L", (64, 64), 255))
    body = {"prompt": "a", "init_images": [image], "mask": mask, "inpaint_full_res": False, "steps": 1}
    answer = post(url, "img2img", **body, **blurs).json()
    assert json.loads(answer["info"])["ignored"] == ignored
    items = post(url, "png-info", image=answer["images"][0]).json()["items"]
    assert json.loads(items["stable-diffusion"])["mask_blur"] == recorded


def test_another_latent_upscaler_is_named(url: str) -> None:
    """All that begin with "Latent" are the plain one here, and nothing said so."""
    body = {"prompt": "a", "enable_hr": True, "hr_upscaler": "Latent (nearest-exact)"}
    answer = post(url, "txt2img", **body, **SIZE).json()
    assert json.loads(answer["info"])["ignored"] == ["hr_upscaler"]


def test_img2img_with_a_mask(client: webuiapi.WebUIApi, reference: Pipeline) -> None:
    start = Image.effect_noise((64, 64), 90).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    sizes = {"width": 64, "height": 64, "steps": 4, "seed": 3}
    values = {"steps": 4, "seed": 3, "scale": 7.0, "sampler": "Euler a", "init_img": start, **READING}
    plain = client.img2img(images=[start], prompt="a cat", denoising_strength=0.5, **sizes)
    (same,) = reference.generate([ImageRequest("a cat", strength=0.5, **values)])
    assert distance(plain.image, same.pixels) <= 1
    assert plain.parameters["init_images"] is None

    own = {"mask_image": mask, "mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
    painted = client.img2img(images=[start], prompt="a cat", denoising_strength=1, **own, **sizes)
    (same,) = reference.generate([ImageRequest("a cat", strength=1.0, mask=mask, mask_blur=0, **values)])
    assert distance(painted.image, same.pixels) <= 1
    assert np.array_equal(np.asarray(painted.image)[:, 32:], np.asarray(start)[:, 32:])
    assert painted.info["ignored"] == []

    filled = client.img2img(images=[start], **own | {"inpainting_fill": 0}, **sizes)
    assert filled.info["ignored"] == ["inpainting_fill"]
    inverted = client.img2img(images=[start], inpainting_mask_invert=1, **own, **sizes)
    assert np.array_equal(np.asarray(inverted.image)[:, :32], np.asarray(start)[:, :32])
    own |= {"inpaint_full_res": True, "width": 16, "height": 16}
    only_masked = client.img2img(images=[start], **sizes | own)
    assert only_masked.image.size == start.size


def test_several_images_make_a_batch(url: str) -> None:
    images = [base64_png(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue")]
    found = post(url, "img2img", prompt="a", init_images=images, denoising_strength=0.01, steps=2).json()
    red, blue = map(pixels, found["images"])
    assert (red != blue).any()


def test_what_does_nothing_here_is_named(url: str) -> None:
    """Nothing is saved here, of which the reply to `save_images` said nothing."""
    body = {"prompt": "a", "restore_faces": True, "styles": ["oil"], "do_not_save_grid": True, "wibble": 3}
    body["save_images"] = True
    body |= {
        "alwayson_scripts": {"ADetailer": {"args": [False]}, "empty": {"args": []}},
        "seed_resize_from_h": -1,
    }
    body |= {"override_settings": {"CLIP_stop_at_last_layers": 1, "eta_noise_seed_delta": 31337}}
    found = post(url, "txt2img", **body, **SIZE)
    assert found.status_code == 200, found.text
    ignored = json.loads(found.json()["info"])["ignored"]
    expected = [
        "restore_faces",
        "styles",
        "wibble",
        "save_images",
        "alwayson_scripts",
        "override_settings.eta_noise_seed_delta",
    ]
    assert ignored == expected


def test_models(client: webuiapi.WebUIApi, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = client.util_get_model_names()
    assert [name.partition(" [")[0] for name in names] == ["tiny", "twin"]
    assert client.util_get_current_model() == names[0]
    assert not any("/" in str(value) for one in client.get_sd_models() for value in one.values())
    client.util_set_model("twin")
    capsys.readouterr()  # the client prints
    assert client.util_get_current_model() == names[1]
    assert client.txt2img(prompt="a", **SIZE).info["sd_model_name"] == "twin"
    override = {"sd_model_checkpoint": "tiny"}
    assert client.txt2img(prompt="a", override_settings=override, **SIZE).info["sd_model_name"] == "tiny"
    client.set_options({"sd_model_checkpoint": "tiny", "samples_save": False})
    assert client.util_get_current_model() == names[0]
    refused = post(url, "options", sd_model_checkpoint="large")
    assert (refused.status_code, refused.json()["detail"]) == (
        404,
        "no model 'large'; choose from tiny, twin",
    )


def test_options_are_the_clients_own(tmp_path: Path) -> None:
    """CLIP_stop_at_last_layers, which the web UI's own example sets, got the answer 200 and had no effect."""
    log = tmp_path / "log.jsonl"
    two_layers = tiny.model_section({"cond_stage_config.params.layers": 2})
    with live(write_model(tmp_path, "tiny", two_layers), log_file=str(log)) as (url, _):
        url = f"{url}/sdapi/v1"

        def info(**override: Any) -> dict[str, Any]:
            body = {"prompt": "a cat", "seed": 3, "override_settings": override}
            return json.loads(post(url, "txt2img", **body, **SIZE).json()["info"])

        assert info()["clip_skip"] == 1
        answer = post(url, "options", CLIP_stop_at_last_layers=2, sd_model_checkpoint="tiny", eta_ddim=0.3)
        assert (answer.status_code, answer.json()) == (200, None)
        assert httpx.get(f"{url}/options").json()["CLIP_stop_at_last_layers"] == 2
        assert (info()["clip_skip"], info(CLIP_stop_at_last_layers=1)["clip_skip"]) == (2, 1)
        deeper = post(url, "txt2img", override_settings={"CLIP_stop_at_last_layers": 3}, **SIZE)
        assert deeper.json()["detail"].startswith("CLIP_stop_at_last_layers 3: ")
        refused = post(url, "options", CLIP_stop_at_last_layers=0, sd_model_checkpoint="tiny")
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("CLIP_stop_at_last_layers: it is no whole number in 1")
        assert httpx.get(f"{url}/options").json()["CLIP_stop_at_last_layers"] == 2
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["ignored"] for one in asked if "ignored" in one] == [["eta_ddim"]]


def test_png_info(client: webuiapi.WebUIApi) -> None:
    made = client.txt2img(prompt="a cat", seed=5, **SIZE)
    found = client.png_info(made.image)  # which the client writes anew, with its texts
    assert found.info == made.info["infotexts"][0]
    assert found.parameters["seed"] == 5
    assert client.png_info(Image.new("RGB", (8, 8))).info == ""


def test_progress_and_interrupt(client: webuiapi.WebUIApi, url: str, served: tuple[str, Engine]) -> None:
    assert client.get_progress()["progress"] == 0
    results: list[httpx.Response] = []
    body = {"prompt": "a cat", "steps": 1000, "width": 64, "height": 64}
    thread = threading.Thread(target=lambda: results.append(post(url, "txt2img", **body)))
    thread.start()
    end = time.monotonic() + 240
    while not (found := client.get_progress())["current_image"] or not found["progress"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert 0 < found["progress"] < 1
    assert found["eta_relative"] > 0
    assert (found["state"]["job_count"], found["state"]["sampling_steps"]) == (1, 1000)
    assert pixels(found["current_image"]).any()
    assert httpx.get(f"{url}/progress", params={"skip_current_image": True}).json()["current_image"] is None
    client.interrupt()
    thread.join(60)
    assert results[0].status_code == 499
    assert results[0].json()["detail"] == "the request was cancelled"
    assert client.get_progress()["state"]["job_count"] == 0
    assert len(client.txt2img(prompt="a cat", **SIZE).images) == 1  # the queue goes on


@pytest.mark.parametrize(
    ("format", "exif"), [("PNG", b"garbage"), ("WEBP", b"Exif\0\0garbage")], ids=["png", "webp"]
)
def test_png_info_of_damaged_exif_data(url: str, format: str, exif: bytes) -> None:
    """It ended in an internal error."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format=format, exif=exif)
    answer = post(url, "png-info", image=base64.b64encode(file.getvalue()).decode())
    assert answer.status_code == 422
    assert answer.json()["detail"] == "image: the settings in it cannot be read"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("txt2img", {"prompt": 3}, "prompt: 3 is no text"),
        ("txt2img", {"steps": 0}, "steps: it is no whole number in 1 … 1000"),
        ("txt2img", {"steps": "many"}, "steps: it is no whole number"),
        ("txt2img", {"cfg_scale": True}, "cfg_scale: it is no number"),
        ("txt2img", {"sampler_name": "Eulr"}, "sampler_name Eulr is not known; the nearest are euler"),
        ("txt2img", {"scheduler": "turbo"}, "turbo is not known"),
        ("txt2img", {"width": 17, "height": 16}, "width 17 is not a multiple of 8"),
        ("txt2img", {"batch_size": 2, "n_iter": 3}, "6 images are more than 4"),
        ("txt2img", {"seed": -2}, "seed: it is no whole number"),
        ("txt2img", {"tiling": "yes"}, "tiling: it is neither true nor false"),
        ("txt2img", {"override_settings": [1]}, "override_settings: it is no object"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "large"}}, "no model 'large'"),
        (
            "txt2img",
            {"enable_hr": True, "hr_upscaler": "/etc/passwd"},
            "hr_upscaler: this service has Latent",
        ),
        ("txt2img", {"prompt": "a <lora:../../secret:1>"}, "lora"),
        ("img2img", {}, "init_images: give a list"),
        ("img2img", {"init_images": []}, "init_images: give a list"),
        ("img2img", {"init_images": ["/etc/passwd!"]}, "it is no base64"),
        ("img2img", {"init_images": ["http://127.0.0.1/a.png"]}, "it is no base64"),
        ("img2img", {"init_images": [3]}, "3 is no text"),
        ("png-info", {"image": "aW1hZ2U="}, "image: it is no image"),
        ("png-info", {}, "image"),
        ("options", {"sd_model_checkpoint": 3}, "sd_model_checkpoint: 3 is no text"),
    ],
)
def test_bad_input_is_named_in_the_contracts_form(
    url: str, path: str, body: dict[str, Any], words: str
) -> None:
    response = post(url, path, **body)
    assert response.status_code in (404, 413, 422), response.text[:300]
    assert set(response.json()) == {"error", "detail", "body", "errors"}
    assert words in response.json()["detail"]
    assert "\n" not in response.json()["detail"]
    assert "--" not in response.json()["detail"]  # no options of a command line


def test_malformed_json(url: str) -> None:
    """Half of a surrogate pair is JSON; it is refused in a prompt, and repeated where it does nothing."""
    header = {"content-type": "application/json"}
    for body, status in (('{"styles": ["\\ud800"], "steps": 1}', 200), ('{"prompt": "\\ud800"}', 422)):
        response = httpx.post(f"{url}/txt2img", content=body.encode(), headers=header, timeout=600)
        assert response.status_code == status
    for path in ("txt2img", "img2img", "options", "png-info"):
        response = httpx.post(f"{url}/{path}", content=b'{"prompt": ')
        assert (response.status_code, response.json()["error"]) == (400, "invalid_json")


def test_clients_do_not_see_each_other(model: tuple[Path, Path], tmp_path: Path) -> None:
    tokens = {name: base64.urlsafe_b64encode(name.encode() * 6).decode() for name in ("anna", "bert")}
    (tmp_path / "tokens").write_text("".join(f"{name}:{token}\n" for name, token in tokens.items()))
    (tmp_path / "tokens").chmod(0o600)
    with live(model, ("tiny", "twin"), token_file=str(tmp_path / "tokens")) as (url, engine):
        anna, bert = (
            webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", username=name, password=tokens[name])
            for name in tokens
        )
        anna.set_options({"sd_model_checkpoint": "twin"})
        assert anna.get_options()["sd_model_checkpoint"].startswith("twin")
        assert bert.get_options()["sd_model_checkpoint"].startswith("tiny")
        body = {"prompt": "a cat", "steps": 150, "width": 64, "height": 64}
        thread = threading.Thread(target=lambda: anna.session.post(f"{url}/sdapi/v1/txt2img", json=body))
        thread.start()
        end = time.monotonic() + 240
        while anna.get_progress()["progress"] == 0:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert bert.get_progress()["state"]["job_count"] == 0
        bert.interrupt()
        assert [job.state for job in engine.jobs.active()] == ["running"]
        anna.interrupt()
        thread.join(60)
        with pytest.raises(RuntimeError, match="401"):
            webuiapi.WebUIApi(baseurl=anna.baseurl, username="anna", password="x").txt2img(prompt="a")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("img2img", {"init_images": ["no image!"]}, "init_images: it is no base64"),
        ("img2img", {"init_images": [None]}, "init_images: give a list of images in base64"),
        ("txt2img", {"enable_hr": True, "hr_scale": 1}, "hr_scale 1: the second pass is for a larger image"),
        (
            "txt2img",
            {"enable_hr": True, "hr_resize_y": 8},
            "the factor by hr_resize_y: 0.5 is not a number in range: 1",
        ),
    ],
)
def test_errors_name_the_web_uis_fields(url: str, path: str, body: dict[str, Any], words: str) -> None:
    """They said init_img, strength and so on, which no client had sent; and of init_images [null]
    "denoising_strength 0.75 without init_images", of which the one was added and the other given.
    """
    assert post(url, path, prompt="a", **body, **SIZE).json()["detail"].startswith(words)


# The schema


@pytest.mark.parametrize("read", ["number", "whole", "switch"])
def test_the_schema_allows_what_is_taken(read: str) -> None:
    """It allowed neither numbers as texts nor 0 and 1 for a switch, which the web UI's clients send."""
    kind = {"number": NUMBER, "whole": WHOLE, "switch": SWITCH}[read]
    limits = (False,) if read == "switch" else (None, -100, 100)
    values = [7, 0, 1, -1.0, 7.5, True, False, None, [], {}, "true", "", "seven", "7e1", "NaN", "+", "7."]
    values += ["7", " 7 ", "-7", "+7", "7.0", "7.00", "7.5", "007", "7 7", "７", "7\n"]
    for value in values:
        try:
            getattr(Fields({"x": value}), read)("x", *limits)
            taken = True
        except BadRequest:
            taken = False
        assert jsonschema_rs.validator_for(kind).is_valid(value) is taken, value


def test_the_schema_has_every_number_and_switch_as_it_is_read(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inpainting_mask_invert` was said to be any whole number, and the mask's blur to be a whole one."""
    seen: dict[str, dict] = {}
    for read, kind in (("number", NUMBER), ("whole", WHOLE), ("switch", SWITCH)):
        plain = getattr(Fields, read)

        def spy(self: Fields, name: str, *more: Any, plain: Any = plain, kind: dict = kind) -> Any:
            seen[name] = kind
            return plain(self, name, *more)

        monkeypatch.setattr(Fields, read, spy)
    image = base64_png(Image.new("RGB", (16, 16)))
    asked = {
        "txt2img": {"enable_hr": False},
        "img2img": {"init_images": [image], "mask": image, "denoising_strength": 0.9},
    }
    for path, schema in (("txt2img", TXT2IMG), ("img2img", IMG2IMG)):
        seen.clear()
        assert post(url, path, prompt="a", **SIZE, **asked[path]).status_code == 200
        seen.pop("CLIP_stop_at_last_layers")  # of override_settings
        found = {name: each for name, each in schema["properties"].items() if each in (NUMBER, WHOLE, SWITCH)}
        assert found == {name: kind for name, kind in seen.items() if name in schema["properties"]}
        assert set(seen) - set(found) <= {"include_init_images"}  # there, and of no use, in txt2img
