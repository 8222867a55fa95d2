"""The page's server: what it refuses, and that the page works over HTTP."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tiny_inpainting
import tiny_service
import tiny_siblings
from live_page import page
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

pytest.importorskip("gradio")

from starlette.testclient import TestClient

from ldm.errors import InputError
from ldm.pipeline.infotext import read_settings
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.service.engine import Engine
from ldm.service.errors import BadRequest
from ldm.service.limits import check_files
from ldm.service.models import NamedModel
from ldm.service.options import ServiceOptions
from ldm.webui.files import BUNDLED_LORAS, Files
from ldm.webui.options import PageLimits, PageOptions
from ldm.webui.server import (
    BESIDE_FILE,
    CLOSED,
    create_app,
    open_engine,
    page_models,
    private_folder,
    serve,
)
from ldm.weights.hashes import same_model
from ldm.weights.loading import find

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def limit() -> Iterator[None]:
    """A page sets Pillow's limit for its whole process, which has other tests here."""
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with private_folder() as folder:
        yield folder
    assert not folder.exists()


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Path]) -> Iterator[Engine]:
    with tiny_service.running(model) as engine:
        yield engine


@contextmanager
def opened(engine: Engine, folder: Path, **options: Any) -> Iterator[TestClient]:
    app = create_app(engine, Files(), PageOptions(**options), folder)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def client(engine: Engine, folder: Path) -> Iterator[TestClient]:
    with opened(engine, folder) as client:
        yield client


def call(client: TestClient, element: str, session: str = "one", **given: Any) -> dict:
    """The last message about the event of a component, by its id in the page, called as the page does.

    `given` are values of components by their ids; others have those of the page when it opens.
    """
    config = client.get("/config").json()
    parts = {part["id"]: part for part in config["components"]}
    event = next(
        one
        for one in config["dependencies"]
        if any(parts[target]["props"].get("elem_id") == element for target, _ in one["targets"])
    )
    data = []
    for number in event["inputs"]:
        props = parts[number]["props"]
        data.append(given.get(props.get("elem_id"), props.get("value")))
    body = {"fn_index": event["id"], "data": data, "session_hash": session, "event_data": None}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    last = {}
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_completed":
                    last = message
                if message["msg"] == "close_stream":
                    break
    return last


def test_every_answer_forbids_other_servers(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "http" not in policy
    assert {"default-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_another_sites_name_for_this_machine_is_refused(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example"):
        assert client.get("/config", headers={"host": host}).status_code == 403
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert client.get("/config", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_are_refused(client: TestClient) -> None:
    """They could upload files until the disk was full, and those on this machine could read the page."""
    host = {"host": "127.0.0.1:7860"}
    file = {"files": ("z.bin", b"z")}
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "http://[", "null"):
        headers = {**host, "origin": origin}
        assert client.get("/config", headers=headers).status_code == 403
        answer = client.post("/gradio_api/upload", files=file, headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    for own in ({}, {"origin": "http://127.0.0.1:7860"}):
        assert client.post("/gradio_api/upload", files=file, headers=host | own).status_code == 200


@pytest.mark.parametrize("path", ["/login", "/gradio_api/queue/join", "/gradio_api/upload"])
def test_bodies_have_a_limit(engine: Engine, folder: Path, tmp_path: Path, path: str) -> None:
    """A body of any length was held in memory, even of those who had not given a password."""
    users = tmp_path / "users"
    users.write_text("me:secret\n")
    kind = {"content-type": "application/x-www-form-urlencoded" if path == "/login" else "application/json"}
    if path.endswith("upload"):
        kind = {"content-type": "multipart/form-data; boundary=x"}
    large = engine.options.max_body_bytes + BESIDE_FILE + 1
    with opened(engine, folder, auth_file=str(users)) as client:
        if path.endswith("upload"):
            client.post("/login", data={"username": "me", "password": "secret"})
        declared = client.post(path, content=b"a", headers=kind | {"content-length": str(large)})
        assert declared.status_code == 413
        chunks = iter([b"a" * (large // 2), b"a" * (large // 2 + 1)])
        chunked = client.post(path, content=chunks, headers=kind)
        assert chunked.status_code == 413
        assert client.post(path, content=b"a" * 2**20, headers=kind).status_code not in (413, 500)


@pytest.mark.parametrize("route", CLOSED)
def test_what_the_page_does_not_need_is_closed(client: TestClient, route: str) -> None:
    for path in (f"/gradio_api/{route}x", f"/{route}x", f"//gradio_api/{route}x"):
        assert client.get(path).status_code in (403, 404)
    assert client.get(f"/gradio_api/{route}x").status_code == 403


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", "../../etc/passwd", "%2Fetc%2Fpasswd"])
def test_no_file_of_the_machine_can_be_read(client: TestClient, path: str) -> None:
    for place in (path, str(Path(path).absolute())):
        answer = client.get(f"/gradio_api/file={place}")
        assert answer.status_code in (403, 404)
        assert b"root:" not in answer.content


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1:9/secret.png", "https://example.org/a.png", "../a.png"]
)
def test_neither_can_one_be_sent_in_place_of_an_upload(
    client: TestClient, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = call(client, "dropped", dropped={"path": path, "meta": {"_type": "gradio.FileData"}})
    assert found["success"] is False
    assert "root:" not in json.dumps(found)
    capfd.readouterr()  # gradio's own report


def test_an_upload_beyond_the_limit_is_refused(engine: Engine, folder: Path, client: TestClient) -> None:
    large = bytes(engine.options.max_body_bytes + 1)
    answer = client.post("/gradio_api/upload", files={"files": ("a.png", large, "image/png")})
    assert answer.status_code == 413


def test_an_image_is_made(client: TestClient) -> None:
    found = call(client, "generate", prompt="a red cube", set_steps="2", set_seed="7")
    assert found["success"], found
    text = json.dumps(found["output"])
    assert "1 image in" in text
    assert "--prompt 'a red cube' --ddim_steps 2 --seed 7" in text
    file = text.split('"path": "')[1].split('"')[0]
    answer = client.get(f"/gradio_api/file={file}")
    assert answer.content[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"set_steps": "0"}, "Steps: 0 is not a whole number in range"),
        ({"set_steps": "<b>"}, "Steps: &lt;b&gt; is not a whole number"),
        ({"set_steps": "1000"}, "teps: 1000 are more than this service"),
        ({"set_width": "4096", "set_height": "4096"}, "4096x4096 are 16,777,216 pixels"),
        ({"set_width": "20"}, "idth 20 is not a multiple of 8"),
        ({"images": 17}, "Images: 17 is not a whole number in range: 1 … 16"),
        ({"images": 0}, "Images: 0 is not a whole number in range: 1 … 16"),
        ({"images": 2.7}, "Images: 2.7 is not a whole number in range: 1 … 16"),
        ({"task": "inpaint"}, "Inpaint starts from an image"),
    ],
)
def test_a_mistake_is_one_line_on_the_page(
    client: TestClient, given: dict, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = call(client, "generate", prompt="a red cube", **given)
    text = json.dumps(found["output"], ensure_ascii=False)
    assert words in text
    assert "Traceback" not in text
    assert "Traceback" not in capfd.readouterr().err


def uploaded(client: TestClient, name: str, data: bytes) -> dict:
    """What the page sends for an uploaded file."""
    (path,) = client.post("/gradio_api/upload", files={"files": (name, data)}).json()
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def file_of(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def bomb() -> bytes:
    """The head of a PNG file of 900 megapixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no image", "cannot read the image a.png: it is no PNG, JPEG or WebP file"),
        (bomb(), "a.png has too many pixels; --max_pixels allows 4,194,304"),
    ],
    ids=["text", "bomb"],
)
@pytest.mark.parametrize("where", ["image", "editor"])
def test_an_upload_that_cannot_be_read_is_one_line(
    client: TestClient, data: bytes, words: str, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """gradio opened it before the page did: "Error" on the page, and a traceback in the terminal."""
    file = uploaded(client, "a.png", data)
    if where == "editor":
        file = {"background": file, "layers": [], "composite": None, "id": None}
    task = "image" if where == "image" else "inpaint"
    found = call(client, "generate", prompt="a red cube", task=task, **{where: file})
    assert words in json.dumps(found["output"], ensure_ascii=False)
    assert "Traceback" not in capfd.readouterr().err


def test_a_jpeg_of_print_is_an_image_to_start_from(client: TestClient) -> None:
    """A file in CMYK, which PNG has not, left the page busy for ever."""
    file = uploaded(client, "a.jpg", file_of(Image.new("CMYK", (16, 16)), "JPEG"))
    found = call(client, "generate", prompt="a cube", task="image", set_steps="2", image=file)
    assert "1 image in" in json.dumps(found["output"])


@pytest.mark.parametrize("session", ["../outside", "ABSOLUTE", "a/b", "\0"])
def test_a_session_names_no_folder(client: TestClient, folder: Path, tmp_path: Path, session: str) -> None:
    """A browser chooses its session's name, which was a part of the path of its results."""
    session = session.replace("ABSOLUTE", str(tmp_path / "outside"))
    found = call(client, "generate", session, prompt="a red cube", set_steps="1")
    text = json.dumps(found["output"])
    assert "1 image in" in text
    file = Path(text.split('"path": "')[1].split('"')[0])
    assert file.parents[1] == folder / "results"
    assert not (tmp_path / "outside").exists()
    assert not (folder / "outside").exists()


def test_a_sheet_is_drawn(client: TestClient) -> None:
    given = {"x_values": "1, 2", "y_values": "ddim, euler", "prompt": "a red cube", "set_seed": "7"}
    found = call(client, "draw_sheet", **given)
    text = json.dumps(found["output"])
    assert "--x steps 1 2 --y sampler ddim euler" in text
    settings = read_settings(text.split('"path": "')[1].split('"')[0])
    assert (settings["x"], settings["y"]) == (["steps", "1", "2"], ["sampler", "ddim", "euler"])
    assert (settings["seed"], settings["prompt"]) == (7, "a red cube")


def test_a_page_with_users_asks_for_them(engine: Engine, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("ann:secret")
    with opened(engine, folder, auth_file=str(tmp_path / "users"), host="0.0.0.0") as client:
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/queue/join", json={"fn_index": 0, "data": []}).status_code == 401
        wrong = client.post("/login", data={"username": "ann", "password": "wrong"})
        assert wrong.status_code == 400
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
        assert client.get("/config").status_code == 200
        assert client.get("/config", headers={"host": "page.example"}).status_code == 200


def test_a_button_that_is_pressed_while_the_task_changes_takes_the_new_tasks_model(
    model: tuple[Path, Path], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The browser sent the former task's model, as it had not been given the new list yet. gradio refused it
    with a toast "Error" and a traceback in the terminal, or it made the image.
    """
    enlarging = tiny_siblings.write_model(tmp_path, "enlarging", tiny_siblings.upscaler_section())
    models = {"tiny": model, "paint": tiny_inpainting.write_model(tmp_path), "x4": enlarging}
    named = [NamedModel(name, str(weights), str(config)) for name, (config, weights) in models.items()]
    runtime = RuntimeOptions(device="cpu", batch_size=8)
    data = file_of(Image.new("RGBA", (16, 16), "black"), "PNG")
    settings = {}
    with (
        Engine.open(named, ServiceOptions(), runtime, safety="off") as several,
        opened(several, folder) as client,
    ):
        for task in ("image", "inpaint", "upscale"):
            assert call(client, "task", session=task, task=task)["success"]
            image, below, stroke = (uploaded(client, f"{name}.png", data) for name in "abc")
            drawn = {"background": below, "layers": [stroke], "composite": None, "id": None}
            # whatever is not given here is as the page was before its task changed
            given = {"task": task, "image": image, "editor": drawn, "set_steps": "2"}
            text = json.dumps(call(client, "generate", session=task, **given)["output"])
            assert "1 image in" in text
            settings[task] = read_settings(text.split('"path": "')[1].split('"')[0])
    for task, name in (("image", "tiny"), ("inpaint", "paint"), ("upscale", "x4")):
        assert same_model(settings[task]["model_hash"], models[name][1])
    strengths = [one.get("strength") for one in settings.values()]
    assert strengths == [0.75, 1.0, None]
    assert "Traceback" not in capfd.readouterr().err


def required(extra: str) -> set[str]:
    """The packages, by their normalized names, that pip installs with an extra in setup.py, ours included."""
    found: dict[str, Any] = {}
    stand_in = SimpleNamespace(setup=lambda **facts: found.update(facts), find_packages=lambda **_: [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", stand_in)
        runpy.run_path(str(ROOT / "setup.py"))
    waiting = [Requirement(text) for text in [*found["install_requires"], *found["extras_require"][extra]]]
    known: set[tuple[str, str]] = set()  # names with each of their extras, "" for none
    while waiting:
        one = waiting.pop()
        for name, option in {(canonicalize_name(one.name), option) for option in ("", *one.extras)} - known:
            known.add((name, option))
            try:
                requires = distribution(name).requires or ()
            except PackageNotFoundError:  # those of other platforms
                continue
            waiting += [
                each
                for each in map(Requirement, requires)
                if each.marker is None or each.marker.evaluate({"extra": option})
            ]
    return {found["name"], *(name for name, _ in known)}


ALONE = """
import json, runpy, sys
from importlib.machinery import PathFinder

gone, find = set(json.loads(sys.argv.pop(1))), PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in gone else find(name, path, target)

PathFinder.find_spec = find_spec
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_its_own_extra_is_all_that_the_page_needs(model: tuple[Path, Path], tmp_path: Path) -> None:
    """With [webui] alone it ended before it began: No module named 'prometheus_client'."""
    there = required("webui")
    gone = [
        module
        for module, owners in packages_distributions().items()
        if there.isdisjoint(map(canonicalize_name, owners))
    ]
    assert "pytest" in gone
    assert "gradio" not in gone
    with page(model, tmp_path, ["-c", ALONE, json.dumps(gone)]) as (process, address):
        with httpx.Client(base_url=address, timeout=60) as client:
            for button in ("generate", "draw_sheet"):
                found = call(client, button, prompt="a red cube", set_steps="1", x_values="1, 2")
                assert found["success"], found
                assert re.search("[14] images? in", json.dumps(found["output"]))
        process.terminate()
        process.wait(60)


def test_sigterm_while_models_are_read_leaves_no_folder(tmp_path: Path) -> None:
    """The folder of uploads and results stayed."""
    program = (
        "import time\n"
        "from ldm.webui.server import private_folder\n"
        "with private_folder() as folder:\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        folder = Path(process.stdout.readline().strip())
        assert folder.parent == tmp_path
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not folder.exists()


def test_a_port_in_use_is_one_line() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: Address already in use"):
            serve(None, PageOptions(port=port), print)


def test_a_prompt_may_name_the_bundled_lora_beside_an_own_folder(tmp_path: Path) -> None:
    """The page offered it in its list, and said of a prompt that names it that it was not there."""
    folder = tmp_path / "loras"
    folder.mkdir()
    options = PageLimits(lora_folder=str(folder))
    named = ["scenes-64=models/scenes-64/model.safetensors"]
    engine, files = open_engine(named, options, RuntimeOptions(device="cpu"), safety="off")
    request = ImageRequest("a cube <lora:few-steps:1>", prompt_syntax="a1111", sampler="tcd")
    files.check(request)
    check_files(request, engine.options)
    engine.models.resolve("scenes-64", request)
    (bundled,) = engine.models.reader("scenes-64").adapters.files
    assert bundled.name == "few-steps.safetensors"
    (folder / "few-steps.safetensors").write_bytes(b"")  # an own one of the name goes first
    with pytest.raises(InputError, match="few-steps"):
        engine.models.resolve("scenes-64", request)


def test_a_prompt_may_name_a_lora_in_a_folder_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path from the folder was refused, as if it were one from the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras/styles").mkdir(parents=True)
    (tmp_path / "styles").mkdir()
    for name in ("loras/styles/few-steps.safetensors", "styles/other.safetensors"):
        shutil.copy(find(BUNDLED_LORAS[0]), tmp_path / name)
    named = [f"scenes-64={find('models/scenes-64/model.safetensors')}"]
    options, runtime = PageLimits(lora_folder="loras"), RuntimeOptions(device="cpu")
    engine, files = open_engine(named, options, runtime, safety="off")
    for name in ("few-steps", "styles/few-steps", "styles/Few-Steps.safetensors"):
        request = ImageRequest(f"a cube <lora:{name}:1>", prompt_syntax="a1111", sampler="tcd")
        files.check(request)
        check_files(request, engine.options)
        engine.models.resolve("scenes-64", request)
        (found,) = engine.models.reader("scenes-64").adapters.files
        assert found == Path("loras/styles/few-steps.safetensors")
    request = ImageRequest("a <lora:styles/other:1>", prompt_syntax="a1111")  # in the working folder
    with pytest.raises(InputError, match="no LoRA"):
        files.check(request)
    with pytest.raises(BadRequest, match='there is no "styles/other"; this service has few-steps'):
        engine.models.resolve("scenes-64", request)


def test_without_a_choice_every_task_has_a_model() -> None:
    names = [one.name for one in page_models(())]
    bundled = {
        "scenes-128",
        "scenes-128-inpainting",
        "scenes-128-depth",
        "scenes-x4",
        "scenes-64",
        "scenes-64-v",
    }
    assert bundled <= set(names)
    assert page_models(["a=b.ckpt"]) == ["a=b.ckpt"]
