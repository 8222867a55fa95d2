import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_service
from fastapi.testclient import TestClient
from PIL import Image

from ldm.images.metadata import LARGEST
from ldm.pipeline.infotext import read_metadata
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.service import native
from ldm.service.app import Service, create_app
from ldm.service.engine import Engine
from ldm.service.moderation import Moderation

ASKED = {"prompt": "a red cube", "seed": 7, "steps": 2}
TOKENS = {"ann": "secret-of-ann", "bob": "secret-of-bob"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.jsonl"


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Path], log: Path) -> Iterator[Engine]:
    tokens = log.with_name("tokens")
    tokens.write_text("".join(f"{name}:{token}\n" for name, token in TOKENS.items()))
    options = {"log_file": str(log), "token_file": str(tokens), "max_steps": 20, "max_images": 3}
    with tiny_service.running(model, ("tiny", "other"), **options) as started:
        yield started


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    app = create_app(Service(engine, engine.options))
    with TestClient(
        app, base_url="http://localhost", headers=headers_of("ann"), raise_server_exceptions=False
    ) as found:
        yield found


def headers_of(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


# Images


def test_images_are_those_of_the_pipeline(client: TestClient, model: tuple[Path, Path]) -> None:
    answer = client.post("/generate", json=ASKED | {"count": 2})
    assert answer.status_code == 200
    job = answer.json()
    assert (job["state"], job["progress"], job["model"]) == ("finished", 1.0, "tiny")
    assert [image["seed"] for image in job["images"]] == [7, 8]
    assert job["images"][0]["settings"]["prompt"] == "a red cube"
    pipeline = Pipeline.open(str(model[1]), str(model[0]), safety="off")
    asked = [ImageRequest("a red cube", seed=seed, steps=2) for seed in (7, 8)]
    for image, expected in zip(job["images"], pipeline.generate(asked), strict=True):
        assert np.abs(pixels(image["image"]) - expected.pixels.astype(int)).max() <= 1


def test_an_image_has_its_settings_and_no_folder_of_the_service(
    client: TestClient, model: tuple[Path, Path], tmp_path: Path
) -> None:
    text = client.post("/generate", json=ASKED).text
    path = tmp_path / "image.png"
    path.write_bytes(base64.b64decode(json.loads(text)["images"][0]["image"]))
    assert read_metadata(path)["seed"] == 7
    assert str(model[0].parent) not in text + str(read_metadata(path))


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_an_accept_header_asks_for_the_file_itself(client: TestClient, format: str, kind: str) -> None:
    media = f"image/{format}"
    answer = client.post("/generate", json=ASKED | {"format": format}, headers={"Accept": media})
    assert (answer.headers["content-type"], answer.headers["x-seed"]) == (media, "7")
    assert Image.open(io.BytesIO(answer.content)).format == kind


def test_an_image_that_its_format_cannot_hold_is_refused_before_sampling(
    client: TestClient, engine: Engine
) -> None:
    """A WebP file of more than 16,383 pixels a side was an internal error, once its image had been made."""
    before = engine.counters["images"]
    answer = client.post("/generate", json=ASKED | {"width": 16_392, "height": 8, "format": "webp"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    words = "16392x8 pixels does not fit into a WEBP file, whose sides have 16,383 at most; use format png"
    assert words in answer.json()["error"]["message"]
    file = io.BytesIO()
    Image.new("RGB", (16_392, 8)).save(file, "PNG")  # from which the size follows
    wide = {"init_img": base64.b64encode(file.getvalue()).decode(), "strength": 0.5, "format": "webp"}
    assert words in client.post("/generate", json=ASKED | wide).json()["error"]["message"]
    assert engine.counters["images"] == before


def test_a_finished_job_that_a_format_cannot_hold_is_still_there_in_another(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GET /jobs/ID?format=webp was an internal error for images of more than 16,383 pixels a side."""
    monkeypatch.setitem(LARGEST, "webp", 8)  # the miniature's images have 16
    place = client.post("/generate", json=ASKED | {"wait": False}).headers["location"]
    wait_for_end(client, place)
    (image,) = client.get(place, params={"format": "webp"}).json()["images"]
    assert (image["image"], image["error"]["code"]) == (None, "invalid_request")
    assert client.get(f"{place}/images/0", params={"format": "webp"}).status_code == 422
    assert client.get(f"{place}/images/0").status_code == 200


def wait_for_end(client: TestClient, place: str) -> None:
    with client.stream("GET", f"{place}/events") as stream:
        list(stream.iter_lines())


def test_each_image_of_a_request_has_its_own_variation_seed(client: TestClient) -> None:
    """They all had the first one's, where those of a run have their own."""
    varied = {"count": 2, "variation_seed": 5, "variation_strength": 0.5}
    settings = [image["settings"] for image in client.post("/generate", json=ASKED | varied).json()["images"]]
    assert [(one["seed"], one["variation_seed"]) for one in settings] == [(7, 5), (8, 6)]


def test_models_are_asked_for_by_name(client: TestClient) -> None:
    assert client.post("/generate", json=ASKED | {"model": "other"}).json()["model"] == "other"
    assert client.post("/generate", json=ASKED).json()["model"] == "tiny"
    found = client.get("/models").json()["models"]
    assert [(model["name"], model["default"], model["size"]) for model in found] == [
        ("tiny", True, 16),
        ("other", False, 16),
    ]


def test_without_a_seed_each_image_gets_one_by_chance(client: TestClient) -> None:
    asked = {"prompt": "a", "steps": 1, "count": 2}
    seeds = [
        image["seed"] for _ in range(2) for image in client.post("/generate", json=asked).json()["images"]
    ]
    assert len(set(seeds)) == 4


# Jobs


def test_a_job_can_be_watched_and_its_images_fetched(client: TestClient) -> None:
    answer = client.post("/generate", json=ASKED | {"wait": False, "count": 2})
    assert answer.status_code == 202
    place = answer.headers["location"]
    assert place == f"/jobs/{answer.json()['id']}"
    with client.stream("GET", f"{place}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-2] == "event: end"
    assert json.loads(lines[-1].removeprefix("data: "))["state"] == "finished"
    progress = [json.loads(line[6:])["progress"] for line in lines if line.startswith("data:")]
    assert progress == sorted(progress)
    job = client.get(place).json()
    file = client.get(f"{place}/images/1")
    assert file.headers["content-type"] == "image/png"
    assert file.content == base64.b64decode(job["images"][1]["image"])
    assert client.get(f"{place}/images/2").status_code == 404
    assert client.get(f"{place}/images/-1").status_code == 404


def test_a_waiting_job_has_its_position_and_can_be_cancelled(
    client: TestClient, gate: threading.Event
) -> None:
    first, second = (
        client.post("/generate", json=ASKED | {"wait": False, "steps": steps}).json()["id"]
        for steps in (2, 3)
    )
    found = client.get(f"/jobs/{second}").json()
    assert (found["state"], found["images"]) == ("queued", [])
    assert client.get(f"/jobs/{second}/images/0").status_code == 404
    cancelled = client.delete(f"/jobs/{second}").json()
    assert (cancelled["state"], cancelled["error"]["code"]) == ("cancelled", "cancelled")
    assert client.get(f"/jobs/{second}/images/0").status_code == 499
    gate.set()
    with client.stream("GET", f"/jobs/{first}/events") as stream:
        assert "finished" in list(stream.iter_lines())[-2]
    assert client.delete(f"/jobs/{first}").json()["state"] == "finished"


def test_previews_are_png_files_of_the_job(client: TestClient, gate: threading.Event, engine: Engine) -> None:
    id = client.post("/generate", json=ASKED | {"wait": False, "preview": True}).json()["id"]
    assert client.get(f"/jobs/{id}/preview").json()["error"]["code"] == "no_preview"
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    job = engine.job(id, "ann")
    assert job.wants_preview
    job.show(0.5, file.getvalue())
    preview = client.get(f"/jobs/{id}/preview")
    assert (preview.headers["content-type"], preview.content) == ("image/png", file.getvalue())
    threading.Timer(0.1, gate.set).start()
    with client.stream("GET", f"/jobs/{id}/events") as stream:
        lines = list(stream.iter_lines())
    data = lines[lines.index("event: preview") + 1]
    assert base64.b64decode(json.loads(data.removeprefix("data: "))["image"]) == file.getvalue()


def test_no_client_sees_what_is_another_ones(client: TestClient) -> None:
    id = client.post("/generate", json=ASKED).json()["id"]
    for path in ("", "/images/0", "/preview", "/events"):
        assert client.get(f"/jobs/{id}{path}", headers=headers_of("bob")).status_code == 404
    assert client.delete(f"/jobs/{id}", headers=headers_of("bob")).status_code == 404
    theirs = client.get(f"/jobs/{id}", headers=headers_of("bob")).json()
    nobodys = client.get(f"/jobs/{'0' * 32}", headers=headers_of("bob")).json()
    assert theirs["error"]["message"].replace(id, "") == nobodys["error"]["message"].replace("0" * 32, "")
    assert client.get(f"/jobs/{id}/images/0").status_code == 200


def test_a_deadline_ends_a_request(client: TestClient, gate: threading.Event) -> None:
    answer = client.post("/generate", json=ASKED | {"timeout": 0.05})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")


# Moderation


@pytest.mark.parametrize(("reason", "status"), [("no cubes", 400), (None, 503)])
def test_a_lone_image_without_its_verdict_is_an_error(
    engine: Engine, reason: str | None, status: int
) -> None:
    """Unless a header asked for the file itself, the answer was 200, with the error inside."""

    async def verdict(what: str, content: object) -> str | None:
        if what == "image" and reason is None:
            raise RuntimeError("the hook fails")
        return reason if what == "image" else None

    service = Service(engine, engine.options, moderation=Moderation(verdict))
    with TestClient(create_app(service), base_url="http://localhost", headers=headers_of("ann")) as client:
        for accept in ("application/json", "image/png"):
            answer = client.post("/generate", json=ASKED, headers={"Accept": accept})
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == (
                "content_policy" if reason else "moderation_unavailable"
            )
        several = client.post("/generate", json=ASKED | {"count": 2})
        assert several.status_code == 200
        assert [(one["image"], "error" in one) for one in several.json()["images"]] == [(None, True)] * 2
        place = client.post("/generate", json=ASKED | {"wait": False}).headers["location"]
        with client.stream("GET", f"{place}/events") as stream:
            assert list(stream.iter_lines())
        job = client.get(place)
        assert (job.status_code, job.json()["state"], job.json()["images"][0]["image"]) == (
            200,
            "finished",
            None,
        )
        assert client.get(f"{place}/images/0").status_code == status


# Bad input


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ({"model": "zz"}, 404, "no model 'zz'; choose from tiny, other"),
        ({"model": 5}, 422, "model: 5 is no text"),
        ({"wait": "no"}, 422, "wait: it is neither true nor false"),
        ({"timeout": 0}, 422, "timeout: it is no number in 0.001"),
        ({"timeout": "soon"}, 422, "timeout: "),
        ({"count": 4}, 422, "count: 4 is more than this service's 3 images"),
        ({"count": 1.5}, 422, "count: it is no whole number"),
        ({"format": "bmp"}, 422, "format: choose from png, jpg, webp"),
        ({"steps": 21}, 422, "steps: 21 are more than this service's 20"),
        ({"width": 8000, "height": 8000}, 422, "8000x8000"),
        ({"width": 12}, 422, "width 12 is not a multiple of 8; the nearest is"),
        ({"sampler": "zz"}, 422, "sampler zz is not known"),
        ({"init_img": "/etc/passwd?"}, 422, "init_img: it is no base64"),
    ],
)
def test_bad_input_is_one_line_in_the_contracts_form(
    client: TestClient, values: dict, status: int, words: str
) -> None:
    answer = client.post("/generate", json=ASKED | values)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message"}
    assert words in answer.json()["error"]["message"]
    assert client.post("/generate", json=ASKED | {"steps": 1}).status_code == 200  # the queue goes on


def test_the_page_describes_the_request(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/generate"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert schema["properties"]["steps"]["maximum"] == 20
    assert schema["properties"]["model"]["enum"] == ["tiny", "other"]
    assert {"wait", "timeout", "preview", "count", "format", "sampler", "mask"} <= schema["properties"].keys()


def test_the_page_says_that_a_token_is_needed(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    assert page["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert page["security"] == [{"token": []}]


# Operation


def test_health_and_readiness_need_no_token_and_figures_do(client: TestClient) -> None:
    client.get(client.post("/generate", json=ASKED | {"wait": False}).headers["Location"])
    client.post("/generate", json=ASKED)
    nobody = {"Authorization": ""}
    assert client.get("/health", headers=nobody).json() == {"status": "ok"}
    assert client.get("/ready", headers=nobody).json() == {"status": "ready"}
    assert client.get("/metrics", headers=nobody).status_code == 401
    text = client.get("/metrics").text
    assert "sd_waiting_images 0.0" in text
    assert 'sd_http_requests_total{method="POST",route="/generate",status="200"}' in text
    assert 'route="/jobs/{id}"' in text


def test_the_log_has_every_request_and_no_prompt(client: TestClient, log: Path) -> None:
    client.post("/generate", json=ASKED | {"prompt": "very private"})
    client.get("/nowhere%0d%0a{}")
    *_, made, lost = map(json.loads, log.read_text().splitlines())
    assert (made["client"], made["path"], made["status"], made["model"]) == ("ann", "/generate", 200, "tiny")
    assert (lost["status"], lost["error"]) == (404, "not_found")
    assert "private" not in log.read_text()


def test_prompts_are_in_the_log_where_that_is_asked_for(model: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with tiny_service.running(model, log_file=str(path), log_prompts=True) as engine:
        service = Service(engine, engine.options)
        with TestClient(create_app(service), base_url="http://localhost") as client:
            client.post("/generate", json=ASKED | {"prompt": 'one\n{"event": "forged"}'})
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["prompts"] == ['one\n{"event": "forged"}']


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_by_head(client: TestClient, path: str) -> None:
    """HEAD, by which some load balancers ask, was answered with 405."""
    answer = client.head(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert "head" not in client.get("/openapi.json").json()["paths"][path]


def test_large_answers_are_made_in_a_thread(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base64 of all images, and their JSON, held up every other request."""
    plain, threads = native.base64_of, []

    def spy(data: bytes) -> str:
        try:
            asyncio.get_running_loop()
            threads.append("loop")
        except RuntimeError:
            threads.append("thread")
        return plain(data)

    monkeypatch.setattr(native, "base64_of", spy)
    job = client.post("/generate", json=ASKED | {"count": 2}).json()
    client.get(f"/jobs/{job['id']}")
    assert threads == ["thread"] * 4
