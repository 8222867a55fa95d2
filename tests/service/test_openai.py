"""OpenAI's images API, by OpenAI's own client against a real server."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tiny_service
from exif_data import damaged_exif
from fastapi.testclient import TestClient
from live_service import decoded, live, pixels
from PIL import Image

from ldm.errors import FieldError
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.service.app import Service, create_app
from ldm.service.moderation import Moderation

STEPS = {"steps": 2}


@pytest.fixture(scope="module")
def url(model: tuple[Path, Path]) -> Iterator[str]:
    with live(model, ("tiny", "twin"), max_images=4, loaded_models=2) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        yield client


@pytest.fixture(scope="module")
def reference(model: tuple[Path, Path]) -> Pipeline:
    return Pipeline.load(str(model[1]), str(model[0]), safety="off")


def file_of(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


@pytest.fixture(scope="module")
def start() -> Image.Image:
    return Image.effect_noise((64, 64), 90).convert("RGB")


def test_generate(client: openai.OpenAI, reference: Pipeline) -> None:
    found = client.images.generate(prompt="a cat", n=2, extra_body={"seed": 5, "sampler": "Euler a", **STEPS})
    wanted = reference.generate(
        [ImageRequest("a cat", seed=seed, steps=2, sampler="euler_ancestral") for seed in (5, 6)]
    )
    for image, same in zip(found.data, wanted, strict=True):
        assert image.url is None
        assert np.abs(pixels(image.b64_json) - same.pixels).max() <= 1
    assert (found.size, found.output_format, found.background) == ("16x16", "png", "opaque")


@pytest.mark.parametrize(("format", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_an_address_holds_the_image_itself(client: openai.OpenAI, format: str, name: str) -> None:
    found = client.images.generate(
        prompt="a cat", response_format="url", output_format=format, size="24x32", extra_body=STEPS
    )
    (image,) = found.data
    start, _, text = image.url.partition(",")
    assert (image.b64_json, start) == (None, f"data:image/{format};base64")
    assert (decoded(text).format, decoded(text).size, found.size) == (name, (24, 32), "24x32")


def test_what_other_services_decide_by_is_accepted(client: openai.OpenAI) -> None:
    found = client.images.generate(
        prompt="a cat",
        size="auto",
        quality="hd",
        style="vivid",
        user="me",
        background="auto",
        moderation="low",
        output_compression=80,
        extra_body=STEPS,
    )
    assert decoded(found.data[0].b64_json).size == (16, 16)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "twin"]
    assert client.models.retrieve("twin").id == "twin"
    assert client.images.generate(model="twin", prompt="a cat", extra_body=STEPS).data[0].b64_json
    with pytest.raises(openai.NotFoundError) as error:
        client.images.generate(model="dall-e-2", prompt="a cat")
    assert error.value.body == {
        "message": "no model 'dall-e-2'; choose from tiny, twin",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-2")


def test_an_edit_paints_what_the_mask_leaves_transparent(
    client: openai.OpenAI, reference: Pipeline, start: Image.Image
) -> None:
    mask = Image.new("RGBA", start.size, (0, 0, 0, 255))
    mask.paste((9, 9, 9, 0), (0, 0, 32, 64))
    own = {"seed": 3, "mask_blur": 0, **STEPS}
    found = client.images.edit(image=file_of(start), mask=file_of(mask), prompt="a cat", n=2, extra_body=own)
    white = Image.new("L", start.size)
    white.paste(255, (0, 0, 32, 64))
    values = {"steps": 2, "init_img": start, "mask": white, "strength": 1.0, "mask_blur": 0}
    wanted = reference.generate([ImageRequest("a cat", seed=seed, **values) for seed in (3, 4)])
    for image, same in zip(found.data, wanted, strict=True):
        got = pixels(image.b64_json)
        assert np.abs(got - same.pixels).max() <= 1
        assert np.array_equal(got[:, 32:], np.asarray(start)[:, 32:])
        assert (got[:, :32] != np.asarray(start)[:, :32]).any()
    # without a mask, the image's own transparency is one
    start = start.convert("RGBA")
    start.paste((0, 0, 0, 0), (0, 0, 32, 64))
    (image,) = client.images.edit(image=("a.png", file_of(start)), prompt="a cat", extra_body=own).data
    assert np.array_equal(pixels(image.b64_json)[:, 32:], np.asarray(start)[:, 32:, :3])


def test_an_edit_without_a_mask_starts_from_the_image(
    client: openai.OpenAI, reference: Pipeline, start: Image.Image
) -> None:
    own = {"strength": 0.5, "seed": 3, "long_prompts": True, "steps": 4}
    (found,) = client.images.edit(image=[file_of(start)], prompt="a cat", extra_body=own).data
    (wanted,) = reference.generate([ImageRequest("a cat", init_img=start, **own)])
    assert np.abs(pixels(found.b64_json) - wanted.pixels).max() <= 1


@pytest.mark.parametrize("timesteps", [[900, 100], "900,100", [900]])
def test_an_edit_takes_lists_of_numbers(client: openai.OpenAI, start: Image.Image, timesteps: Any) -> None:
    """OpenAI's client sends a field for each number, which were "given 4 times"; one alone stays a text."""
    own = {"outpaint": [0, 16, 0, 0], "timesteps": timesteps}
    (found,) = client.images.edit(image=file_of(start), prompt="a cat", extra_body=own).data
    assert decoded(found.b64_json).size == (64, 80)


@pytest.mark.parametrize(
    ("format", "exif", "size"),
    [
        ("PNG", b"garbage", (128, 64)),
        ("WEBP", b"Exif\0\0garbage", (128, 64)),
        ("JPEG", damaged_exif(), (64, 128)),
    ],
    ids=["png", "webp", "jpeg"],
)
def test_an_edit_of_an_image_with_damaged_exif_data(
    client: openai.OpenAI, format: str, exif: bytes, size: tuple[int, int]
) -> None:
    """They ended in an internal error, where the native contract turns the image as far as it can be read."""
    file = io.BytesIO()
    Image.new("RGB", (128, 64)).save(file, format=format, exif=exif)
    (found,) = client.images.edit(image=file.getvalue(), prompt="a cat", extra_body=STEPS).data
    assert decoded(found.b64_json).size == size


def test_each_image_of_a_request_has_its_own_variation_seed(
    client: openai.OpenAI, reference: Pipeline
) -> None:
    """They all had the first one's, where those of a run have their own."""
    varied = {"seed": 5, "variation_seed": 8, "variation_strength": 0.5, **STEPS}
    found = client.images.generate(prompt="a cat", n=2, extra_body=varied)
    wanted = reference.generate(
        [ImageRequest("a cat", **varied | {"seed": 5 + k, "variation_seed": 8 + k}) for k in range(2)]
    )
    for image, same in zip(found.data, wanted, strict=True):
        assert np.abs(pixels(image.b64_json) - same.pixels).max() <= 1


def test_a_stream_shows_previews_and_then_the_image(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.service.batch.PREVIEW_INTERVAL", 0.0)
    own = {"seed": 5, "steps": 30}
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body=own))
    names = [event.type for event in events]
    assert names == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    sizes = {decoded(event.b64_json).size for event in events[:-1]}
    assert sizes == {(256, 256)}  # enlarged, as latents are small
    whole = client.images.generate(prompt="a cat", extra_body=own).data[0]
    assert np.array_equal(pixels(events[-1].b64_json), pixels(whole.b64_json))
    assert events[-1].usage.total_tokens == 0


def test_a_streamed_edit(client: openai.OpenAI, start: Image.Image) -> None:
    image = file_of(start, "JPEG")
    events = list(client.images.edit(image=image, prompt="a cat", stream=True, n=2, extra_body=STEPS))
    assert [event.type for event in events] == ["image_edit.completed"] * 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("reason", "status"), [("no cats", 400), (None, 503)])
def test_one_image_without_its_verdict_fails_the_request(
    model: tuple[Path, Path], stream: bool, reason: str | None, status: int
) -> None:
    """As OpenAI itself does. A stream had sent the images before it."""
    seen: list[bytes] = []

    async def verdict(what: str, content: Any) -> str | None:
        if what == "prompt":
            return None
        seen.append(content)
        if len(seen) == 2 and reason is None:
            raise RuntimeError("the hook fails")
        return reason if len(seen) == 2 else None

    body = {"prompt": "a cat", "n": 2, "stream": stream, **STEPS}
    with tiny_service.running(model) as engine:
        service = Service(engine, engine.options, moderation=Moderation(verdict))
        with TestClient(create_app(service), base_url="http://localhost") as client:
            answer = client.post("/v1/images/generations", json=body)
    assert len(seen) == 2
    code = "content_policy_violation" if reason else "moderation_unavailable"
    if not stream:
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    else:
        (line,) = (line for line in answer.text.splitlines() if line.startswith("data: "))
        assert json.loads(line.removeprefix("data: "))["error"]["code"] == code


def test_a_stream_that_fails_says_so(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr("ldm.service.engine.Engine._images_of", failing)
    with pytest.raises(openai.APIError, match="sampling failed") as error:
        list(client.images.generate(prompt="a cat", stream=True, extra_body=STEPS))
    assert "secret" not in str(error.value)


def test_an_error_within_a_stream_names_the_contracts_fields(
    client: openai.OpenAI, start: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named the toolkit's own, where the same request without a stream named OpenAI's."""

    def failing(*_: Any) -> Any:
        raise FieldError("{init_img}: it cannot be read")

    monkeypatch.setattr("ldm.service.engine.Engine._images_of", failing)
    body, found = {"prompt": "a cat", "extra_body": STEPS}, []
    with pytest.raises(openai.APIError) as error:
        client.images.edit(image=file_of(start, "PNG"), **body)
    found.append(error.value.message)
    with pytest.raises(openai.APIError) as error:
        list(client.images.edit(image=file_of(start, "PNG"), stream=True, **body))
    found.append(error.value.message)
    assert all("image: it cannot be read" in message and "init_img" not in message for message in found)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": 3}, "prompt", "no text"),
        ({"prompt": "a", "n": 0}, "n", "1 … 4"),
        ({"prompt": "a", "n": 5}, "n", "1 … 4"),
        ({"prompt": "a", "n": True}, "n", "1 … 4"),
        ({"prompt": "a", "size": "large"}, "size", "WIDTHxHEIGHT"),
        (
            {"prompt": "a", "size": "17x16"},
            "size",
            "size: width 17 is not a multiple of 8; the nearest is 16",
        ),
        ({"prompt": "a", "size": "63x63"}, "size", "size: height 63 is not a multiple of 8"),
        ({"prompt": "a", "size": "0x0"}, "size", "size: height 0 is not a whole number in range"),
        ({"prompt": "a", "size": "99999x99999"}, "size", "size: height 99999 is not"),
        ({"prompt": "a", "size": "auto", "H": 63}, "height", "height 63 is not a multiple of 8"),
        ({"prompt": "a", "mask": "aW1hZ2U="}, "mask", "mask: images are given to /v1/images/edits"),
        ({"prompt": "a", "image": "aW1hZ2U="}, "image", "image: images are given to /v1/images/edits"),
        ({"prompt": "a", "size": "16x16", "width": 16}, "size", "give one of them"),
        ({"prompt": "a", "size": "9992x9992"}, "size", "size: 9992x9992 are 99,840,064 pixels"),
        ({"prompt": "a", "response_format": "png"}, "response_format", "b64_json, url"),
        ({"prompt": "a", "output_format": "svg"}, "output_format", "png, jpeg, webp"),
        (
            {"prompt": "a", "size": "16392x8", "output_format": "webp"},
            None,
            "does not fit into a WEBP file, whose sides have 16,383 at most; use output_format png",
        ),
        ({"prompt": "a", "background": "transparent"}, "background", "cannot be made"),
        ({"prompt": "a", "partial_images": 2}, "partial_images", "stream"),
        ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images", "0 … 3"),
        ({"prompt": "a", "stream": True, "partial_images": 1, "n": 2}, "partial_images", "n 1"),
        ({"prompt": "a", "stream": "maybe"}, "stream", "true nor false"),
        ({"prompt": "a", "step": 3}, "step", "did you mean steps?"),
        ({"prompt": "a", "steps": 0}, "steps", "1 … 1,000"),
        ({"prompt": "a", "model": 3}, "model", "no text"),
        ({"prompt": "a", "init_img": "/etc/passwd", "strength": 0.5}, "init_img", "image"),
    ],
)
def test_bad_input_is_named_in_the_contracts_form(
    url: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    """Of size "63x63" the message and `param` said "height", and of a mask "without init_img"."""
    response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
    assert response.status_code in (400, 422)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert "\n" not in error["message"]


SQUARE = file_of(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(
    ("data", "files", "words"),
    [
        ({"prompt": "a"}, {"x": b"x"}, "image: give one file, not 0"),
        ({"prompt": "a"}, [("image[]", SQUARE), ("image[]", SQUARE)], "image: give one file, not 2"),
        ({"prompt": "a"}, {"image": b"no image"}, "image: it is no image"),
        ({"prompt": "a"}, {"image": SQUARE[: len(SQUARE) // 2]}, "image: the image is damaged"),
        ({"prompt": "a"}, {"image": SQUARE, "mask": SQUARE}, "mask: no pixel of it is transparent"),
        (
            {"prompt": "a"},
            {"image": SQUARE, "mask": file_of(Image.new("RGBA", (8, 8)))},
            "mask: its size is 8x8 and the image's is 64x64",
        ),
        ({"prompt": "a", "image": "/etc/passwd"}, {"mask": SQUARE}, "image: it is no file"),
        ({}, {"image": SQUARE}, "prompt: it is missing"),
        ({"prompt": "a", "n": "many"}, {"image": SQUARE}, "n: it is no whole number"),
        ({"prompt": ["a", "b"]}, {"image": SQUARE}, "prompt: it is given 2 times"),
        ({"prompt": "a", "soft": "maybe"}, {"image": SQUARE}, "soft: it is neither true nor false"),
    ],
)
def test_a_form_that_cannot_be_used(url: str, data: Any, files: Any, words: str) -> None:
    response = httpx.post(f"{url}/v1/images/edits", data=data, files=files, timeout=600)
    assert response.status_code == 422
    assert words in response.json()["error"]["message"]


def test_an_image_of_too_many_pixels_is_not_decoded(url: str) -> None:
    """A bomb: 4 kB of file, 25 million pixels."""
    bomb = file_of(Image.new("1", (5000, 5000)))
    assert len(bomb) < 20_000
    response = httpx.post(f"{url}/v1/images/edits", data={"prompt": "a"}, files={"image": bomb}, timeout=600)
    assert response.status_code in (413, 422)
    assert "image: 5000x5000" in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_malformed_bodies(url: str, content: bytes) -> None:
    for path in ("generations", "edits"):
        response = httpx.post(f"{url}/v1/images/{path}", content=content, timeout=600)
        assert response.status_code in (400, 415, 422)
        assert response.json()["error"]["type"] == "invalid_request_error"
    header = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(f"{url}/v1/images/edits", content=content, headers=header, timeout=600)
    assert response.status_code in (400, 422)
    assert "error" in response.json()


def test_the_clients_key_is_the_token(model: tuple[Path, Path], tmp_path: Path) -> None:
    token = base64.urlsafe_b64encode(bytes(range(24))).decode()
    (tmp_path / "tokens").write_text(f"me:{token}\n")
    (tmp_path / "tokens").chmod(0o600)
    with live(model, token_file=str(tmp_path / "tokens")) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as known:
            assert known.images.generate(prompt="a cat", extra_body=STEPS).data[0].b64_json
        other = openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0)
        with other as unknown, pytest.raises(openai.AuthenticationError) as error:
            unknown.models.list()
    assert error.value.body["type"] == "authentication_error"


def test_prompts_stay_text_in_events(url: str) -> None:
    """A prompt with line ends must not end an event of a stream."""
    body = {"prompt": "a cat\n\nevent: error\ndata: {}", "stream": True, **STEPS}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=600) as response:
        lines = [line for line in response.iter_lines() if line]
    assert [line.partition(":")[0] for line in lines] == ["event", "data"]
    assert json.loads(lines[1].removeprefix("data: "))["type"] == "image_generation.completed"


def test_a_stream_whose_client_leaves_is_cancelled(model: tuple[Path, Path]) -> None:
    body = {"prompt": "a", "steps": 1000, "size": "64x64", "stream": True, "partial_images": 1}
    with live(model, max_steps=1000) as (url, engine):
        stream = httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=600)
        with stream as response:
            lines = response.iter_lines()  # kept: a generator that goes closes the connection
            assert next(lines) == "event: image_generation.partial_image"
            (job,) = engine.jobs.active()
        assert job.wait(240).state == "cancelled"
        again = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", **STEPS}, timeout=600)
        assert again.status_code == 200  # the queue goes on
