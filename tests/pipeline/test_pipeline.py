"""Pipeline: what a request becomes, what is sampled together, out of memory, NaN in low precision, files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Result, refused
from PIL import Image
from safetensors.torch import save_file
from tiny_sampling import Recorder, tiny_model
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.images.pixels import to_float, to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.optimize import apply as apply_module
from ldm.pipeline import GeneratedImage, ImageRequest, Pipeline, RuntimeOptions, batches
from ldm.pipeline import pipeline as pipeline_module
from ldm.sampling.noise import ImageNoise, ImageSeeds
from ldm.weights.loading import BUNDLED_WEIGHTS, ROOT, SMALL_WEIGHTS

Command = Callable[..., Result]
Load = Callable[..., Pipeline]


def pixels(images: Iterator[GeneratedImage]) -> list[np.ndarray]:
    return [image.pixels.astype(int) for image in images]


def assert_near(images: list[np.ndarray], others: list[np.ndarray]) -> None:
    """Equal to one level."""
    for image, other in zip(images, others, strict=True):
        assert np.abs(image - other).max() <= 1


def colour(red: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), (red, 90, 255 - red), np.uint8))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of latents in each call of the UNet."""
    found, plain = [], LatentDiffusion.apply_model

    def counted(self, x: Tensor, *args: object) -> Tensor:
        found.append(len(x))
        return plain(self, x, *args)

    monkeypatch.setattr(LatentDiffusion, "apply_model", counted)
    return found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the text encoder was asked for; "long …" has twice the usual number of tokens."""
    found, plain = [], LatentDiffusion.get_learned_conditioning

    def embed(self, prompts: list[str]) -> Tensor:
        found.extend(prompts)
        if not prompts[0].startswith("long"):
            return plain(self, prompts)
        return torch.cat([plain(self, [prompts[0]]), plain(self, [prompts[0][::-1]])], dim=1)

    monkeypatch.setattr(LatentDiffusion, "get_learned_conditioning", embed)
    return found


# Requests, resolved


def test_the_model_decides_what_a_request_leaves_open(load: Load, tmp_path: Path) -> None:
    pipeline = load()
    request = pipeline.resolve(ImageRequest("a cat", width=24))
    assert (request.height, request.width, request.scale, request.zero_snr) == (16, 24, 7.5, False)
    image = colour(200).resize((100, 70))
    request = pipeline.resolve(ImageRequest(init_img=image, strength=0.5))
    assert (request.height, request.width, request.scale) == (64, 64, 5.0)
    assert pipeline.resolve(request) == request
    with pytest.raises(FieldError, match=r"^height 20 is not a multiple of 8; the nearest is 16$"):
        pipeline.resolve(ImageRequest(height=20))


@pytest.mark.parametrize(
    ("marks", "zero_snr"), [(("v_pred",), False), (("v_pred", "ztsnr"), True), (("ztsnr",), False)]
)
def test_a_marked_file_is_sampled_as_it_was_trained(load: Load, tmp_path: Path, marks, zero_snr) -> None:
    """A file that carries `v_pred` or `ztsnr` was sampled as one that predicts the noise."""
    path = tmp_path / "marked.safetensors"
    save_file(tiny.state_dict() | {name: torch.zeros(1) for name in marks}, path)
    pipeline = load(weights=path)
    request = pipeline.resolve(ImageRequest("a cat", steps=2))
    assert (request.zero_snr, request.schedule) == (zero_snr, "trailing" if zero_snr else None)
    assert pipeline.model.parameterization == ("v" if "v_pred" in marks else "eps")
    assert (pipeline.trajectory(request)[1].sigmas[0] > 1000) == zero_snr
    (image,) = pipeline.generate([request])
    assert image.settings["zero_snr"] is zero_snr
    if zero_snr:
        assert pipeline.resolve(ImageRequest(zero_snr=False)).schedule is None


def test_levels_that_are_too_near_are_refused_before_a_model_is_read(model: tuple[Path, Path]) -> None:
    """They were found when their batch began: in the middle of a run, or after a first pass."""
    pipeline = Pipeline.open(str(model[1]), str(model[0]))
    near = {"sampler": "dpmpp_2m_sde", "sigmas": (10.0, 9.99999, 0.0)}
    with pytest.raises(FieldError, match=r"too near for dpmpp_2m_sde; take other sigmas$"):
        pipeline.resolve(ImageRequest("a cat", **near))
    even = {"sampler": "dpmpp_sde", "schedule": "polyexponential", "rho": 20.0}
    with pytest.raises(FieldError, match=r"take fewer hires_steps or a rho nearer to 1$"):
        pipeline.resolve(ImageRequest("a cat", steps=2, hires=2.0, hires_steps=900, **even))
    assert "model" not in vars(pipeline)
    before, alphas = pipeline._alphas, pipeline.model.alphas_cumprod
    np.testing.assert_array_equal(before, alphas)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"scale": 1.0}, 1),
        ({"scale": 7.5}, 2),
        ({"scale": 1.0, "cfg_pp": True}, 2),
        ({"scale": 1.0, "prompt": "a AND b AND c", "prompt_syntax": "a1111"}, 4),
    ],
)
def test_a_probe_is_as_much_work(load: Load, changes: dict[str, Any], rows: int) -> None:
    """With CFG++ at scale 1 --batch_size auto measured half of each call, and tiles were chosen for half."""
    request = ImageRequest(**{"prompt": "a cat", "steps": 4, **changes})
    assert request.rows == rows
    assert batches.probe(request).rows == rows


def test_zero_snr_is_not_for_a_model_that_predicts_the_noise(load: Load, command: Command, model) -> None:
    with pytest.raises(FieldError, match=r"^zero_snr: this model predicts the noise"):
        load().resolve(ImageRequest(zero_snr=True))
    result = command("txt2img", "--config", model[0], "--ckpt", model[1], "--zero_snr")
    refused(result, "--zero_snr: this model predicts the noise (eps)")


def test_memory_is_kept_before_weights_come_into_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was kept after loading only: to pack v1's weights in bfloat16 took 3 s in new memory, not 1 s."""
    order: list[str] = []
    read = pipeline_module.load_model
    monkeypatch.setattr(pipeline_module, "load_model", lambda *given: order.append("weights") or read(*given))
    monkeypatch.setattr(apply_module, "keep_memory", lambda: order.append("memory"))
    _ = load(eager=False).model
    assert order[:2] == ["memory", "weights"]
    order.clear()
    _ = load(eager=True).model
    assert order == ["weights"]


# Batches


VARIED = [
    {"prompt": "a cat", "seed": 3},
    {"prompt": "a dog", "seed": 4, "scale": 2.0},
    {"prompt": "long story", "seed": 3, "negative_prompt": "blurry", "scale": 11.0},
    {"prompt": "", "seed": 2**40, "negative_prompt": "long winded", "scale": 0.0},
]


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "heun"])
@pytest.mark.parametrize("init", [False, True], ids=["txt2img", "img2img"])
def test_requests_of_one_batch_may_differ(load: Load, calls, encoded, sampler: str, init: bool) -> None:
    """In prompt, its number of tokens, negative prompt, seed, scale and init image: one call of the model for
    all contexts of the same lengths, and each image as it is alone."""
    start = [{"init_img": colour(80 * k), "strength": 0.6, "height": 16, "width": 16} for k in range(4)]
    requests = [
        ImageRequest(sampler=sampler, steps=5, **own | (start[k] if init else {}))
        for k, own in enumerate(VARIED)
    ]
    alone = pixels(load(batch_size=1).generate(requests))
    assert set(calls) == {2}
    single = len(calls)
    calls.clear()
    assert_near(pixels(load(batch_size=4).generate(requests)), alone)
    assert set(calls) == {4, 2}  # two together, and each of the longer ones
    assert len(calls) == single * 3 / 4
    assert len({image.tobytes() for image in alone}) == 4


def test_guidance_is_not_shared_with_what_has_none(load: Load, calls) -> None:
    requests = [ImageRequest("a cat", steps=1, scale=scale) for scale in (1.0, 3.0, 1.0, 2.0)]
    list(load(batch_size=8).generate(requests))
    assert calls == [2, 4]


def test_images_come_in_the_order_of_their_requests(load: Load, calls) -> None:
    """Though those that agree are sampled together."""
    requests = [ImageRequest(f"number {k}", steps=2 + k % 2) for k in range(6)]
    images = list(load(batch_size=2).generate(requests))
    assert [image.request.prompt for image in images] == [f"number {k}" for k in range(6)]
    assert [image.seed for image in images] == list(range(42, 48))
    assert calls == [4] * 2 + [2] * 2 + [4] * 3 + [2] * 3
    assert_near(pixels(iter(images)), pixels(load(batch_size=1).generate(requests)))


def test_an_embedding_outlives_the_call(load: Load, encoded: list[str]) -> None:
    pipeline = load(batch_size=2)
    for seed in (1, 2):
        list(pipeline.generate([ImageRequest(prompt, steps=1, seed=seed) for prompt in ("a", "b", "a")]))
    assert sorted(encoded) == ["", "a", "b"]


def test_adaptive_steps_are_those_of_each_image(load: Load) -> None:
    requests = [
        ImageRequest(prompt, sampler="dpm_adaptive", steps=2, seed=k) for k, prompt in enumerate("abc")
    ]
    alone, together = (pixels(load(batch_size=size).generate(requests)) for size in (1, 3))
    # the steps are the same; the batch is decoded at once, which may round otherwise
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(alone, together, strict=True)) <= 1


def test_seeds_of_requests_without_one(load: Load) -> None:
    pipeline = load()
    images = list(
        pipeline.generate(
            [ImageRequest("a", steps=1), ImageRequest("a", steps=1, seed=7), ImageRequest("a", steps=1)]
        )
    )
    assert [image.seed for image in images] == [42, 7, 44]
    assert list(pipeline.generate([])) == []


def test_fixed_code_starts_each_batch_from_the_same_noise(load: Load) -> None:
    requests = [ImageRequest("a", steps=1, fixed_code=True) for _ in range(4)]
    images = list(load(batch_size=2).generate(requests))
    assert [image.request.start_seed for image in images] == [42, 43, 42, 43]


def test_the_one_stream_is_for_equal_settings(load: Load) -> None:
    pipeline = load(batch_size=2)
    images = list(pipeline.generate([ImageRequest("a", steps=1, rng="compvis") for _ in range(3)]))
    assert len({image.pixels.tobytes() for image in images}) == 3
    with pytest.raises(InputError, match=r"^rng compvis is one stream for images of equal settings"):
        list(pipeline.generate([ImageRequest("a", steps=steps, rng="compvis") for steps in (1, 2)]))


def test_what_has_no_effect_is_said_once(load: Load, caplog) -> None:
    list(load().generate([ImageRequest(p, negative_prompt="x", scale=1, steps=1) for p in "ab"]))
    assert caplog.text.count("--negative_prompt does nothing at --scale 1") == 1


def test_without_steps_an_image_makes_the_round_trip(load: Load) -> None:
    """The posterior's sample, decoded; without steps and without an image there is nothing to make."""
    pipeline = load()
    (found,) = pipeline.generate([ImageRequest(init_img=colour(200), strength=0, seed=5)])
    with torch.inference_mode():
        posterior = pipeline.model.encode_first_stage(to_float([np.asarray(colour(200))]))
        noise = ImageNoise([ImageSeeds(5)], (4, 8, 8), torch.device("cpu")).posterior()
        z = pipeline.model.get_first_stage_encoding(posterior, noise)
        expected = to_uint8(pipeline.model.decode_first_stage(z))
    assert_near([found.pixels.astype(int)], [expected[0].astype(int)])


def test_at_full_strength_the_init_image_has_no_say(load: Load) -> None:
    requests = [ImageRequest(init_img=colour(red), strength=1, steps=2, seed=1) for red in (0, 255)]
    first, second = pixels(load(batch_size=1).generate(requests))
    assert np.array_equal(first, second)


# Out of memory


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes a method fail for more than so many images; returns the sizes that were tried."""

    def limit(images: int, error: Exception, name: str = "decode_first_stage") -> list[int]:
        plain, tried = getattr(LatentDiffusion, name), []

        def limited(self, x):
            tried.append(len(x))
            if len(x) > images:
                raise error
            return plain(self, x)

        monkeypatch.setattr(LatentDiffusion, name, limited)
        return tried

    return limit


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "mps"])
def test_a_batch_that_does_not_fit_is_halved(txt2img: Command, too_large, error) -> None:
    """And those after it are made in halves at once; the images are the same."""
    argv = ["--n_iter", 2, "--ddim_eta", 0.5]
    whole = txt2img(*argv, folder="whole")
    tried = too_large(1, error)
    result = txt2img(*argv)
    assert tried == [4, 2, *[1] * 8]
    assert result.code == 0
    assert result.err == [
        "out of memory with 4 images of 16x16 at once: going on with 2",
        "out of memory with 2 images of 16x16 at once: going on with 1",
    ]
    assert_near(result.images, whole.images)
    assert [s["seed"] for s in result.settings] == list(range(42, 50))


def test_out_of_memory_while_images_are_encoded(load: Load, too_large, monkeypatch, caplog) -> None:
    """It was an error without advice. The batch is halved, and one image is refused in words."""
    requests = [ImageRequest(init_img=colour(60 * k), strength=0.5, steps=2) for k in range(4)]
    pipeline = load(batch_size=4)
    expected = pixels(pipeline.generate(requests))
    plain, tried = LatentDiffusion.encode_first_stage, []

    def limited(self, x: Tensor) -> DiagonalGaussianDistribution:
        tried.append(len(x))
        if len(tried) == 4:
            raise OUT_OF_MEMORY[0]
        return plain(self, x)

    monkeypatch.setattr(LatentDiffusion, "encode_first_stage", limited)
    assert_near(pixels(pipeline.generate(requests)), expected)
    assert caplog.messages == ["out of memory with 4 images of 64x64 at once: going on with 2"]
    too_large(0, OUT_OF_MEMORY[1], "encode_first_stage")
    with pytest.raises(InputError, match=r"^out of memory with one image of 64x64"):
        list(load(batch_size=4).generate(requests))


def test_steps_that_were_for_nothing_are_taken_back(load: Load, too_large) -> None:
    too_large(2, OUT_OF_MEMORY[0])
    taken: list[int] = []
    list(load(batch_size=4).generate([ImageRequest("a", steps=2)] * 4, taken.append))
    assert sum(taken) == 8
    assert min(taken) == -8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--H 24", "out of memory with one image of 16x24; take a smaller --H and --W"),
        ("--rng compvis", "out of memory with 4 images of 16x16; the original's stream (--rng compvis)"),
    ],
)
def test_what_cannot_be_halved_is_an_error(txt2img: Command, too_large, argv: str, words: str) -> None:
    too_large(0, OUT_OF_MEMORY[1])
    result = txt2img(*argv.split())
    assert result.code == 2
    assert result.err[-1].startswith(f"txt2img.py: error: {words}")


def test_a_pipeline_of_a_built_model(load: Load) -> None:
    """A model that is built already, as in training: its own sizes and parameterization."""
    request = ImageRequest("a cat", steps=2, seed=3)
    plain = load()
    pipeline = Pipeline.of_model(plain.model)
    assert all(map(np.array_equal, pixels(pipeline.generate([request])), pixels(plain.generate([request]))))
    plain.model.parameterization = "v"
    assert Pipeline.of_model(plain.model).resolve(ImageRequest(zero_snr=True)).zero_snr


# Precision, and what saves memory or time


@pytest.fixture
def bundled(command: Command) -> Command:
    """Run the command on a bundled model, the small one: twenty steps, two images."""
    base = ["--prompt", "a red cube on top of a blue sphere", "--steps", 20, "--n_samples", 2, "--n_iter", 1]
    base += ["--ckpt", ROOT / SMALL_WEIGHTS]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)))


@pytest.mark.parametrize(("precision", "floor"), [("half", 38), ("bf16", 22), ("autocast", 90)])
def test_lower_precision_is_near_full(bundled: Command, precision: str, floor: float) -> None:
    full = bundled(folder="full")
    result = bundled("--precision", precision)
    assert result.code == 0
    for image, exact in zip(result.images, full.images, strict=True):
        assert psnr(image, exact) > floor
    assert {s["precision"] for s in result.settings} == {"full" if precision == "autocast" else precision}
    assert {s["precision"] for s in full.settings} == {"full"}


@pytest.mark.parametrize(
    ("argv", "key", "floor"),
    [
        ("--deepcache 2", "deepcache", 30),
        ("--tome 0.5", "tome", 28),
        ("--attention_slicing", None, 60),
        ("--low_vram max", None, 90),
    ],
)
def test_modes_are_applied_and_named(bundled: Command, argv: str, key: str | None, floor: float) -> None:
    exact = bundled(folder="exact")
    result = bundled(*argv.split())
    assert result.code == 0
    for image, other in zip(result.images, exact.images, strict=True):
        assert psnr(image, other) > floor
        assert np.array_equal(image, other) == (floor == 90 or key is None)
    added = result.settings[0].keys() - exact.settings[0].keys()
    assert added == ({key} if key else set())
    if key is None:
        assert any(line.startswith("peak memory of the process: ") for line in result.err)
    else:
        again = bundled("--like", result.paths[0], folder="again")
        assert psnr(again.images[0], result.images[0]) > 45


def test_eager_is_the_reference_and_the_default_is_near_it(bundled: Command) -> None:
    result, eager = bundled(), bundled("--eager", folder="eager")
    assert eager.code == 0
    for image, other in zip(result.images, eager.images, strict=True):
        assert psnr(image, other) > 60


def test_compiling_on_a_cpu_goes_on_without_its_package(bundled: Command, monkeypatch) -> None:
    from ldm.optimize import openvino

    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    result = bundled("--compile", "--steps", 2)
    assert result.code == 0
    assert "--compile: on a CPU it takes OpenVINO: pip install openvino; going on without" in result.err


@pytest.mark.slow
def test_compiling_on_a_cpu_changes_rounding_only(bundled: Command) -> None:
    pytest.importorskip("openvino")
    compiled, eager = bundled("--compile"), bundled("--eager", folder="eager")
    assert compiled.code == 0
    for image, other in zip(compiled.images, eager.images, strict=True):
        assert psnr(image, other) > 50


def test_graphs_change_no_bit_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps recorded, keys and values kept: as on a GPU, with a recorder that runs on a CPU."""
    from ldm.optimize import graph
    from ldm.optimize.apply import speed_up

    recorder = Recorder()
    monkeypatch.setattr(graph, "CudaCapture", lambda device: recorder)
    requests = [
        ImageRequest(prompt, height=64, width=64, steps=5, guidance_end=0.8)
        for prompt in ("a red cube", "a blue sphere", "a green cone")
    ] * 2
    options = RuntimeOptions(device="cpu", batch_size=2, eager=True)
    pipeline = Pipeline.load(str(ROOT / BUNDLED_WEIGHTS), None, options, safety="off")
    plain = pixels(pipeline.generate(requests[:5]))
    speed_up(pipeline.model, RuntimeOptions(graphs=True), torch.device("cuda"))
    assert all(map(np.array_equal, pixels(pipeline.generate(requests[:5])), plain))
    # two images and one, each with guidance and without; three batches of 5 steps
    assert (recorder.captured, recorder.replayed) == (4, 15)


def test_recordings_are_freed_before_a_smaller_batch_is_tried(load: Load, too_large) -> None:
    """That of the size that did not fit kept its memory."""
    from ldm.optimize.graph import graph_unet

    too_large(1, OUT_OF_MEMORY[0])
    pipeline, recorder = load(batch_size=2, eager=True), Recorder()
    runner = graph_unet(pipeline.model, recorder)
    images = pixels(pipeline.generate([ImageRequest("a", steps=2, scale=1.0)] * 2))
    assert recorder.renewed == 1
    assert recorder.captured == 2
    assert len(runner.entries) == 1
    expected = pixels(load(batch_size=1, eager=True).generate([ImageRequest("a", steps=2, scale=1.0)] * 2))
    assert_near(images, expected)


def test_a_model_on_a_gpu_is_used_there_by_either_of_its_names() -> None:
    """torch calls the device "cuda" of a model "cuda:0": the two were taken for different ones."""
    pipeline = Pipeline.of_model(tiny_model())
    pipeline.__dict__["model"] = SimpleNamespace(device=torch.device("cuda:0"))
    for name in ("cuda", "cuda:0"):
        pipeline.use_device(torch.device(name))
    for name in ("cuda:1", "cpu"):
        with pytest.raises(InputError, match=f"on cuda:0 already; it cannot be used on {name}"):
            pipeline.use_device(torch.device(name))
