"""The page in a headless Chromium: what a user does, with the mouse, the keyboard and a phone."""

import importlib.util
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import lora_files
import numpy as np
import pytest
from commands import Result
from PIL import Image
from safetensors import safe_open

from ldm.pipeline.infotext import read_settings

pytest.importorskip("gradio")
pytest.importorskip("playwright")

ROOT = Path(__file__).parents[2]


def _driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page_driver", ROOT / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver = _driver()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(driver.browser_path() is None, reason="no Chromium is on this machine"),
]

# The contrast of every visible text with what is behind it, by WCAG 2; texts over images are left out.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0.95) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const check = (element, colour, text) => {
    const [a, b] = [light(rgb(colour)), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.textContent.trim() || element.closest("script, style, [disabled], .preview")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    check(element, style.color, node.textContent.trim());
  }
  for (const element of document.querySelectorAll("[placeholder]"))
    if (element.checkVisibility() && element.placeholder)
      check(element, getComputedStyle(element, "::placeholder").color, element.placeholder);
  return found;
}"""

# Controls without a name that a screen reader could say.
NAMELESS = """() => [...document.querySelectorAll("#layout :is(input, textarea, select, button)")]
  .filter((e) => e.checkVisibility() && e.type !== "file" && !e.closest("#gallery, #editor"))
  .filter((e) => !(e.labels?.length || e.ariaLabel || e.getAttribute("aria-labelledby")
                   || e.title || e.innerText?.trim() || e.closest("label")))
  .map((e) => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with driver.served() as address:
        yield address


@pytest.fixture
def page(address: str) -> Iterator:
    with driver.browsing(address) as page:
        yield page
        outside = [url for url in page.requested if not url.startswith((address, "data:", "blob:"))]
        assert not outside


def command_of(page: object) -> list[str]:
    return shlex.split(page.input_value("#command textarea"))


def shown_image(page: object, folder: Path, name: str = "shown.png") -> Path:
    """The image that the gallery shows, as its file is."""
    source = page.locator("#gallery img").first.get_attribute("src")
    (folder / name).write_bytes(page.request.get(source).body())
    return folder / name


def test_an_image_is_generated_and_its_command_makes_it_again(
    page: object, command: Callable[..., Result], tmp_path: Path
) -> None:
    driver.fill(page, "prompt", "a red cube to the left of a blue sphere")
    driver.fill(page, "set_steps", "10")
    driver.fill(page, "set_seed", "7")
    page.keyboard.press("Control+Enter")
    assert "1 image in" in driver.finish(page)
    path = shown_image(page, tmp_path)
    words = command_of(page)
    assert words[1] == "scripts/txt2img.py"
    result = command("txt2img", *words[2:])
    ours = np.asarray(Image.open(path)).astype(int)
    assert np.abs(result.images[0] - ours).max() <= 1

    # and dropped onto another page, it fills the controls
    page.reload()
    page.wait_for_selector("#generate")
    page.get_by_label("Image to image", exact=True).check()
    page.set_input_files("#dropped input[type=file]", str(path))
    page.wait_for_function("document.querySelector('#status').innerText.includes('settings of that image')")
    assert page.input_value("#prompt textarea") == "a red cube to the left of a blue sphere"
    assert page.locator("#set_steps").locator("textarea, input").first.input_value() == "10"
    assert page.locator("#set_seed").locator("textarea, input").first.input_value() == "7"
    assert page.get_by_label("Text to image", exact=True).is_checked()
    driver.generate(page)
    again = np.asarray(Image.open(shown_image(page, tmp_path, "again.png"))).astype(int)
    assert np.array_equal(again, ours)


def test_a_mask_is_drawn_and_only_that_is_painted_anew(page: object, tmp_path: Path) -> None:
    driver.fill(page, "prompt", "a green cone")
    driver.fill(page, "set_steps", "5")
    driver.paint(page, str(ROOT / "assets" / "init.png"))
    assert "1 image in" in driver.generate(page)
    assert {"scripts/inpaint.py", "init.png", "mask.png"} <= set(command_of(page))
    files = {}
    for link in page.locator("#inputs a").all():
        name = link.get_attribute("download") or link.inner_text()
        files[name] = tmp_path / Path(name).name
        files[name].write_bytes(page.request.get(link.get_attribute("href")).body())
    start = np.asarray(Image.open(files["init.png"]).convert("RGB")).astype(int)
    mask = np.asarray(Image.open(files["mask.png"]))
    original = np.asarray(Image.open(ROOT / "assets" / "init.png").convert("RGB")).astype(int)
    assert start.shape == original.shape
    assert np.abs(start - original).max() <= 1  # the browser's canvas may round
    assert 0.02 < (mask > 0).mean() < 0.5
    assert np.flatnonzero(mask.any(0)).min() > mask.shape[1] // 3  # on the right, where it was drawn
    made = np.asarray(Image.open(shown_image(page, tmp_path))).astype(int)
    far = np.zeros(mask.shape, bool)
    far[:, : mask.shape[1] // 5] = True
    assert np.abs(made - start)[far].max() <= 1
    assert np.abs(made - start)[mask > 0].mean() > 5


def test_a_job_is_cancelled_and_the_next_one_runs(page: object) -> None:
    driver.fill(page, "prompt", "a red cube")
    driver.fill(page, "set_steps", "150")
    driver.fill(page, "images", "16")
    page.click("#generate")
    page.wait_for_selector("#status progress")
    page.wait_for_selector("#status img.preview")
    page.click("#cancel")
    assert driver.finish(page).strip() == "Cancelled."
    assert page.locator("#generate").is_enabled()
    driver.fill(page, "set_steps", "2")
    driver.fill(page, "images", "2")
    assert "2 images in" in driver.generate(page)


def test_results_go_on_to_other_tasks(page: object) -> None:
    driver.fill(page, "prompt", "a red cube")
    driver.fill(page, "set_steps", "5")
    driver.generate(page)
    page.click("#send_upscale")
    page.wait_for_selector("#image img")
    assert page.get_by_label("Upscale", exact=True).is_checked()
    assert "1 image in" in driver.generate(page)
    assert "scripts/upscale.py" in command_of(page)
    assert "512x512" in page.inner_text("#gallery")


def test_of_two_tasks_chosen_at_once_the_last_one_is_shown(page: object) -> None:
    """The second choice was dropped while the page waited for the answer to the first, which undid it."""
    choose_both = """() => {
      const radio = (name) => document.querySelector(`#task input[value=${name}]`);
      radio("inpaint").click();
      setTimeout(() => radio("upscale").click(), 5);
    }"""
    page.evaluate(choose_both)
    page.wait_for_selector("#model_upscale")
    page.wait_for_timeout(500)
    assert page.get_by_label("Upscale", exact=True).is_checked()
    assert page.locator("#image").is_visible()
    assert not page.locator("#editor").is_visible()


def test_an_image_leads_to_others(page: object, tmp_path: Path) -> None:
    """Image to image, over an estimated depth, and along its edges: each by the command of its own."""
    driver.fill(page, "prompt", "a yellow cone")
    driver.fill(page, "set_steps", "5")
    for task, script in (("Image to image", "img2img"), ("Depth to image", "depth2img")):
        page.get_by_label(task, exact=True).check()
        page.set_input_files("#image input[type=file]", str(ROOT / "assets" / "init.png"))
        page.wait_for_selector("#image img")
        assert "1 image in" in driver.generate(page)
        assert f"scripts/{script}.py" in command_of(page)
    page.get_by_label("Text to image", exact=True).check()
    page.wait_for_function("document.querySelector('#model_text input')?.value === 'scenes-128'")
    driver.generate(page)
    plain = shown_image(page, tmp_path).read_bytes()
    page.get_by_role("button", name="ControlNet").first.click()
    page.click("#control input")
    page.get_by_role("option").nth(1).click()
    page.set_input_files("#control_image input[type=file]", str(ROOT / "assets" / "init.png"))
    page.wait_for_selector("#control_image img")
    assert "1 image in" in driver.generate(page)
    assert "--control" in command_of(page)
    assert shown_image(page, tmp_path).read_bytes() != plain
    # upscaling has no ControlNets: the one that was chosen must not be in the way
    page.get_by_label("Upscale", exact=True).check()
    page.wait_for_selector("#control", state="hidden")
    page.wait_for_selector("#image img")
    assert "1 image in" in driver.generate(page)
    assert "scripts/upscale.py" in command_of(page)


def lora_of_the_bundled_model(path: Path) -> Path:
    """A LoRA with random values for the cross-attention of scenes-64, by the names of its own layers."""
    with safe_open(ROOT / "models/scenes-64/model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.endswith("attn2.to_v.weight")]  # noqa: SIM118
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    names = {key: key.removesuffix(".weight").removeprefix("model.") for key in keys}
    return lora_files.write(path, {names[key]: shapes[key] for key in keys}, alpha=20.0)


def choose(page: object, control: str, name: str) -> None:
    """Choose from the list of this id, whose fold is open."""
    page.click(f"#{control} input")
    page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")


def test_a_lora_is_chosen_with_its_weight(command: Callable[..., Result], tmp_path: Path) -> None:
    """The image is the command's, differs from the one without the LoRA, and names it."""
    folder = tmp_path / "loras"
    folder.mkdir()
    path = lora_of_the_bundled_model(folder / "wobbly.safetensors")
    with driver.served("--lora_folder", str(folder)) as address, driver.browsing(address) as page:
        driver.fill(page, "prompt", "a red cube to the left of a blue sphere")
        driver.fill(page, "set_steps", "10")
        driver.fill(page, "set_seed", "7")
        assert "1 image in" in driver.generate(page)
        plain = np.asarray(Image.open(shown_image(page, tmp_path, "plain.png"))).astype(int)
        page.get_by_role("button", name="LoRA and textual inversions").click()
        choose(page, "loras", "wobbly.safetensors")
        driver.fill(page, "lora_weights", "0.6")
        assert "1 image in" in driver.generate(page)
        made = shown_image(page, tmp_path)
        words = command_of(page)
    assert words[words.index("--lora") + 1] == f"{path}:0.6"
    ours = np.asarray(Image.open(made)).astype(int)
    assert np.abs(ours - plain).mean() > 5
    settings = read_settings(made)
    assert settings["lora"] == ["wobbly.safetensors:0.6"]
    assert settings["lora_hashes"].startswith("wobbly: ")
    result = command("txt2img", *words[2:])
    assert result.code == 0
    assert np.abs(result.images[0] - ours).max() <= 1
    assert result.settings[0]["lora_hashes"] == settings["lora_hashes"]


def test_a_mistake_is_said_and_nothing_is_lost(page: object) -> None:
    driver.fill(page, "prompt", "<b>bold</b>")
    driver.fill(page, "set_steps", "0")
    said = driver.generate(page)
    assert said.strip() == "Steps: 0 is not a whole number in range: 1 … 1,000"
    assert page.input_value("#prompt textarea") == "<b>bold</b>"


@pytest.mark.parametrize(
    ("size", "scheme"), [(driver.DESKTOP, "light"), (driver.PHONE, "dark")], ids=["desktop", "phone"]
)
def test_it_can_be_read_and_reached(address: str, size: tuple[int, int], scheme: str) -> None:
    with driver.browsing(address, size, color_scheme=scheme) as page:
        for task in ("Text to image", "Inpaint"):
            page.get_by_label(task, exact=True).check()
            page.wait_for_timeout(500)
            for button in page.locator("#settings button.label-wrap").all():
                if button.is_visible() and "open" not in (button.get_attribute("class") or ""):
                    button.click()
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
            faint = [(round(ratio, 2), text) for ratio, text in page.evaluate(CONTRAST) if ratio < 4.5]
            assert not faint, json.dumps(faint, ensure_ascii=False)
            assert page.evaluate(NAMELESS) == []


def test_the_tab_key_goes_through_the_page_in_its_order(page: object) -> None:
    page.locator("#task input").first.focus()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id || ''"))
    order = [
        name for name in dict.fromkeys(seen) if name in ("prompt", "negative_prompt", "generate", "command")
    ]
    assert order == ["prompt", "negative_prompt", "generate", "command"]
    assert any(name in ("model_text", "set_width") or name.startswith("range") for name in seen)
