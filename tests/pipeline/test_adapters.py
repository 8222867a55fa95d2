import copy
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import lora_files
import numpy as np
import pytest
import torch
from commands import refused
from diffusers_pipelines import WIDTH, tiny_config, tiny_pipeline
from lora_files import RANK, factors, v1_layers
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.errors import InputError
from ldm.optimize import winograd
from ldm.optimize.autocast import keep_casts
from ldm.optimize.context import keep_context
from ldm.optimize.graph import Recording, graph_unet
from ldm.optimize.layers import KERNELS, has_onednn
from ldm.optimize.offload import offload
from ldm.optimize.timesteps import keep_timesteps
from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions
from ldm.pipeline import adapters as adapters_module
from ldm.pipeline.adapters import Adapters, bytes_of, changeable, lora_hash
from ldm.pipeline.infotext import image_texts
from ldm.util import instantiate_from_config
from ldm.weights.diffusers_names import unet_to_theirs
from ldm.weights.lora_names import flat

FAST = {name: {"eager": False, "kernels": name} for name in KERNELS} | {"eager": {"eager": True}}


def request(*loras: object, **settings: object) -> ImageRequest:
    return ImageRequest("a red cube", steps=2, seed=3, lora=tuple(map(str, loras)), **settings)


def pixels(pipeline: Pipeline, *requests: ImageRequest) -> list[np.ndarray]:
    return [image.pixels.astype(int) for image in pipeline.generate(requests)]


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Of the text encoder, and of the UNet with it."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([800, 20])
    with torch.no_grad():
        text = model.get_learned_conditioning(["a red cube", "a dog"])
        return [text, model.apply_model(x, t, text)]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lora_files.write(tmp_path / "one.safetensors", v1_layers())


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return lora_files.write(tmp_path / "other.safetensors", v1_layers(), "lokr", seed=1)


# The same as the branches that were trained


def branches(model: nn.Module, known: dict, layers: dict, weight: float, stack: ExitStack) -> None:
    """Beside each layer that is named, down and up: what a trainer's hooks compute."""
    modules = changeable(model)
    for k, (name, shape) in enumerate(layers.items()):
        target = known[flat(name)]
        module, _parameter, _ = modules[target.name]
        parts = factors("lora", shape, k)
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]

        def add(layer, inputs, output, down=down, up=up, third=target.third):
            x, scale = inputs[0], weight * 2.0 / RANK
            if isinstance(layer, nn.Conv2d):
                inner = nn.functional.conv2d(x, down, None, layer.stride, layer.padding)
                return output + scale * nn.functional.conv2d(inner, up)
            branch = scale * (x @ down.flatten(1).T @ up.flatten(1).T)
            if third is None:
                return output + branch
            return torch.cat([o + branch if i == third else o for i, o in enumerate(output.chunk(3, -1))], -1)

        stack.callback(module.register_forward_hook(add).remove)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_unet_and_text_encoder_are_those_with_branches(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    model = instantiate_from_config(tiny_config(kind)).eval()
    text = (
        ("q_proj", "k_proj", "v_proj") if kind == "v2" else ()
    )  # of v2 not by hooks: they are in one weight
    layers = lora_files.kohya(pipe.unet, "unet") | lora_files.kohya(pipe.text_encoder, "te", text)
    path = lora_files.write(tmp_path / "all.safetensors", layers)
    adapters = Adapters()
    before = outputs(model)
    with ExitStack() as stack:
        branches(model, adapters.targets(model), layers, 0.4, stack)
        expected = outputs(model)
    adapters.put_on(model, request(f"{path}:0.4"))
    for mine, theirs, plain in zip(outputs(model), expected, before, strict=True):
        assert not torch.allclose(theirs, plain, atol=1e-2)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    adapters.put_on(model, request())
    assert all(map(torch.equal, outputs(model), before))


def test_query_key_and_value_of_open_clip(tmp_path: Path) -> None:
    """In diffusers' copy of the text encoder they are three layers."""
    pipe = tiny_pipeline("v2")
    layers = lora_files.kohya(pipe.text_encoder, "te", ("out_proj", "mlp", "text_projection"))
    path = lora_files.write(tmp_path / "text.safetensors", layers)
    model = instantiate_from_config(tiny_config("v2"))
    plain = {name: module.in_proj_weight.detach().clone() for name, module in fused(model)}
    assert len(layers) >= 6
    Adapters().put_on(model, request(path))
    read = sum("q_proj" in layer for layer in layers)  # the last block is not
    for i, (name, module) in enumerate(fused(model)[:read]):
        for third, projection in enumerate("qkv"):
            layer = f"lora_te_text_model_encoder_layers_{i}_self_attn_{projection}_proj"
            layer = layer if layer in layers else layer.replace("text_model_", "")
            parts = factors("lora", layers[layer], list(layers).index(layer))
            expected = plain[name].chunk(3)[third] + lora_files.difference(parts, layers[layer])
            torch.testing.assert_close(module.in_proj_weight.chunk(3)[third], expected)


def fused(model: nn.Module) -> list:
    return [(n, m) for n, m in model.cond_stage_model.named_modules() if hasattr(m, "in_proj_weight")]


@pytest.mark.parametrize("kind", ["lora", "lokr", "dora"])
def test_peft_computes_the_same(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    unet = copy.deepcopy(tiny_pipeline("v1").unet)  # which others use, too
    names = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj"]
    facts = {
        "r": 4,
        "target_modules": names,
        "init_weights" if kind == "lokr" else "init_lora_weights": False,
    }
    config = (
        peft.LoKrConfig(alpha=2, **facts)
        if kind == "lokr"
        else peft.LoraConfig(lora_alpha=2, use_dora=kind == "dora", **facts)
    )
    model = instantiate_from_config(tiny_config("v1")).eval()
    unet.load_state_dict(unet_to_theirs(model.model.diffusion_model.state_dict()))
    unet = peft.get_peft_model(unet, config).eval()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([800, 20]), torch.randn(2, 77, WIDTH)
    state = {name: value.contiguous() for name, value in peft.get_peft_model_state_dict(unet).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    adapters = Adapters()
    adapters.put_on(model, request(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        expected = unet(x, t, text).sample
        torch.testing.assert_close(model.apply_model(x, t, text), expected, rtol=1e-4, atol=1e-4)


# On a pipeline


@pytest.mark.parametrize("kernels", FAST)
def test_images_come_back_bit_for_bit(
    kernels: str, load: Callable, lora: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels in ("onednn", "winograd") and not has_onednn(torch.float32):
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)  # the miniature's are few
    pipeline, plainly = load(**FAST[kernels]), load()
    sets = [(), (lora,), (), (f"{lora}:0.5", f"{other}:0.7:0"), (lora,), ()]
    images = [pixels(pipeline, request(*one))[0] for one in sets]
    assert np.array_equal(images[0], images[2])
    assert np.array_equal(images[0], images[5])
    assert np.array_equal(images[1], images[4])
    for image, one in zip(images, sets, strict=True):
        expected = pixels(plainly, request(*one))[0]
        assert np.abs(image - expected).max() <= 1
    assert np.abs(images[1] - images[0]).max() > 5


@pytest.mark.parametrize("kernels", FAST)
def test_the_memory_of_what_is_kept(kernels: str, load: Callable, lora: Path, monkeypatch) -> None:
    """Of a 3x3 kernel nine values were counted, where Winograd's tiles keep 16 or 36."""
    if kernels in ("onednn", "winograd") and not has_onednn(torch.float32):
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)  # the miniature's are few
    pipeline = load(**FAST[kernels])
    pixels(pipeline, request(lora))
    states = pipeline.adapters._kept.popitem()[1]
    ratios = set()
    for name, state in states.items():
        replaced = pipeline.adapters.replaced[name]
        if len(replaced.shape) == 4 and replaced.shape[2:] == (3, 3) and not replaced.is_kept:
            ratios.add(bytes_of(state) * 9 // (4 * math.prod(replaced.shape)))
        assert bytes_of(state) >= 4 * math.prod(replaced.shape)
    assert ratios >= {"winograd": {36}, "onednn": {9}}.get(kernels, set())
    assert bytes_of(states.values()) == sum(map(bytes_of, states.values()))


def test_the_text_encoder_has_a_weight_of_its_own(load: Callable, lora: Path) -> None:
    pipeline = load()
    texts = []
    for weight in ("0.8:0", "0:0", "0:0.8", "0.8:0.8", "0.3:0.8"):
        pipeline.adapters.put_on(pipeline.model, request(f"{lora}:{weight}"))
        texts.append(pipeline.embed("a red cube"))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[2], texts[3])
    assert torch.equal(texts[3], texts[4])
    assert not torch.allclose(texts[0], texts[2])


def test_requests_of_different_sets_are_of_different_batches(load: Callable, lora: Path, other: Path) -> None:
    pipeline = load(batch_size=4)
    requests = [request(*one).twin(seed=k) for k, one in enumerate([(lora,), (), (other,), (lora,), ()])]
    together = pixels(pipeline, *requests)
    for one, image in zip(requests, together, strict=True):
        assert np.abs(pixels(pipeline, one)[0] - image).max() <= 1
    assert len({one.batch_key() for one in requests}) == 3


def test_tags_of_a_prompt(load: Callable, lora: Path, tmp_path: Path) -> None:
    a1111 = {"prompt_syntax": "a1111"}
    pipeline = load()
    pipeline.adapters.folder = tmp_path
    tagged = ImageRequest("a red <lora:ONE:0.5:0.8>cube", steps=2, seed=3, **a1111)
    assert tagged.loras == (("ONE", 0.8, 0.5),)
    assert ImageRequest("a red <lora:one:0.5>cube").loras == ()
    expected = request(f"{lora}:0.8:0.5", **a1111)
    assert np.array_equal(pixels(pipeline, tagged)[0], pixels(pipeline, expected)[0])
    image = next(pipeline.generate([tagged]))
    assert image.settings["prompt"] == "a red <lora:ONE:0.5:0.8>cube"
    assert image.settings["lora_hashes"] == f"one: {lora_hash(lora)}"


def test_settings_name_files_weights_and_hashes(load: Callable, lora: Path) -> None:
    image = next(load().generate([request(f"{lora}:0.8")]))
    parameters, own = image_texts(image.settings)
    assert '"lora": ["one.safetensors:0.8"]' in own
    assert f'Lora hashes: "one: {lora_hash(lora)}"' in parameters
    assert len(lora_hash(lora)) == 12
    assert "lora" not in next(load().generate([request()])).settings


def test_one_notice_a_lora(
    load: Callable, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = v1_layers() | {"lora_unet_nowhere": (4, 4)}
    lora_files.write(tmp_path / "some.safetensors", some)
    pipeline = load()
    pixels(pipeline, request(f"{lora}:0.8"), request(tmp_path / "some.safetensors", f"{lora}:0.8"))
    said = [record.getMessage() for record in caplog.records if "layers" in record.getMessage()]
    assert said == [
        "one.safetensors: 12 of 12 layers, weight 0.8",
        "some.safetensors: 12 of 13 layers, weight 1; 1 layer is not in this model (such as unet_nowhere)",
    ]


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("4 steps,\n scale 1", "; its file advises: 4 steps, scale 1"),
        ("\x1b[31mred", "; its file advises: [31mred"),
        ("word " * 100, "; its file advises: " + "word " * 19 + "word…"),
        ("词" * 150, "; its file advises: " + "词" * 99 + "…"),
        (" ", "weight 1"),
    ],
)
def test_what_a_files_maker_advises_is_said_in_one_short_line(
    load: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, hint: str, shown: str
) -> None:
    """LoRAs for few steps were used with the usual guidance and sampler, which burns their images."""
    path = lora_files.write(tmp_path / "a.safetensors", v1_layers(), metadata={"modelspec.usage_hint": hint})
    pixels(load(), request(path))
    (line,) = [record.getMessage() for record in caplog.records if "layers" in record.getMessage()]
    assert line.startswith("a.safetensors: 12 of 12 layers, weight 1")
    assert line.endswith(shown)
    assert len(line) < 200


def test_a_model_of_averaged_weights_alone(
    model: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its UNet's layers counted as missing, and a LoRA without a text encoder's was refused."""
    unet = "model.diffusion_model."
    state = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}" if name.startswith(unet) else name: values
        for name, values in load_file(model[1]).items()
    }
    save_file(state, tmp_path / "ema.safetensors")
    layer = "unet_" + LAYER
    text = "te_text_model_encoder_layers_0_mlp_fc1"
    both = lora_files.write(
        tmp_path / "both.safetensors", {f"lora_{layer}": (32, 32), f"lora_{text}": (128, 32)}
    )
    options = RuntimeOptions(device="cpu", eager=True)
    pipeline = Pipeline.open(
        str(tmp_path / "ema.safetensors"), str(model[0]), options, safety="off", weights="ema"
    )
    alone = lora_files.write(tmp_path / "alone.safetensors", {f"lora_{layer}": (32, 32)})
    for path in (both, alone):
        pipeline.resolve(request(path))
    assert [record.getMessage() for record in caplog.records if "layers" in record.getMessage()] == [
        "both.safetensors: 2 of 2 layers, weight 1",
        "alone.safetensors: 1 of 1 layers, weight 1",
    ]


# Files that change


def test_a_changed_file_is_read_again(load: Callable, lora: Path, other: Path) -> None:
    """A pipeline kept file, weights, embeddings and hash by the path, and made the images of the old file."""
    pipeline, wanted = load(), [request(f"{lora}:0.8"), request(lora)]
    before = pixels(pipeline, *wanted)
    os.replace(other, lora)
    images = list(pipeline.generate(wanted))
    for image, old, new in zip(images, before, pixels(load(), *wanted), strict=True):
        assert np.array_equal(image.pixels, new)
        assert np.abs(image.pixels - old).max() > 0
        assert image.settings["lora_hashes"] == f"one: {lora_hash(lora)}"
    lora.unlink()
    with pytest.raises(InputError, match="there is no LoRA"):
        pixels(pipeline, wanted[0])


def test_embeddings_are_of_the_changed_text_encoder(load: Callable, lora: Path) -> None:
    """The prompt's embedding by the old file was found again for the new one."""
    pipeline, texts = load(), []
    for seed in (0, 5):
        lora_files.write(lora, v1_layers(), seed=seed)
        pipeline.forget_files()
        pipeline.adapters.put_on(pipeline.model, request(lora))
        texts.append(pipeline.embed("a red cube"))
    assert not torch.allclose(*texts)


def test_files_that_stay_are_not_read_again(load: Callable, lora: Path, monkeypatch) -> None:
    pipeline, wanted = load(), request(lora)
    first = pixels(pipeline, wanted)[0]
    monkeypatch.setattr("ldm.pipeline.adapters.merge", lambda *_, **__: pytest.fail("merged again"))
    monkeypatch.setattr("ldm.pipeline.adapters.LoraFile", lambda *_: pytest.fail("read again"))
    assert np.array_equal(pixels(pipeline, wanted)[0], first)


def test_a_run_is_known_by_all_of_a_lora(tmp_path: Path) -> None:
    """--resume compared 64 KiB at 1 MiB, and took up a run with a file that had changed elsewhere."""
    layers = v1_layers() | {"lora_unet_nowhere": (400_000, 4)}
    path = lora_files.write(tmp_path / "large.safetensors", layers)
    adapters = Adapters()
    before = adapters.digests(request(path))
    data = bytearray(path.read_bytes())
    assert len(data) > 0x110000
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))  # the clock of the file system may not have ticked
    adapters.forget()
    assert adapters.digests(request(path)) != before


def test_a_run_is_known_by_the_strength_of_a_lora(tmp_path: Path) -> None:
    """--resume took up a run with a file whose header, or the file beside it, had another alpha."""
    layers, found = {f"lora_unet_{LAYER}": (32, 32)}, []

    def digest(path: Path, **facts: object) -> None:
        lora_files.write(path, layers, alpha=None, **facts)
        found.append(Adapters().digests(request(path))["lora content"])

    path = tmp_path / "a.safetensors"
    digest(path)
    assert found == [lora_hash(path)]  # as runs of before have it
    digest(path, metadata={"remark": "nothing that counts"})
    assert found[0] == found[1]
    settings = '{"unet.r": 4, "unet.lora_alpha": 4}'  # which count for nothing where layers have their own
    lora_files.write(path, layers, metadata={"lora_adapter_metadata": settings})
    assert Adapters().digests(request(path)) == {"lora content": lora_hash(path)}
    for alpha in (4, 8):
        settings = f'{{"unet.r": 4, "unet.lora_alpha": {alpha}}}'
        digest(path, metadata={"lora_adapter_metadata": settings})
    path = tmp_path / "adapter_model.safetensors"
    digest(path)
    assert found[4] == found[0]
    for alpha in (4, 8):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 2, "lora_alpha": {alpha}}}')
        digest(path)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8, "peft_version": "1"}')
    digest(path)
    assert found[6] == found[7]
    assert len(set(found)) == 5
    assert all(one.startswith(lora_hash(path)) for one in found)


def twins(folder: Path) -> list[Path]:
    """Two files of one name."""
    for k, name in enumerate(("first", "second")):
        (folder / name).mkdir()
        lora_files.write(folder / name / "twin.safetensors", v1_layers(), seed=k)
    return [folder / name / "twin.safetensors" for name in ("first", "second")]


def test_a_name_of_two_files_is_refused(command, model: tuple[Path, Path], tmp_path: Path) -> None:
    """The first one in the folder was taken, without a word."""
    first, second = twins(tmp_path)
    argv = ("--config", model[0], "--ckpt", model[1], "--lora_folder", tmp_path, "--lora")
    listed = "first/twin.safetensors, second/twin.safetensors"
    refused(command("txt2img", *argv, "twin:0.5"), "'twin' is the name of 2 LoRAs", "--lora_folder", listed)
    adapters = Adapters(tmp_path)
    assert adapters.find("first/twin") == first
    assert adapters.find("SECOND/twin.safetensors") == second
    top = tmp_path / "twin.safetensors"
    top.write_bytes(first.read_bytes())
    assert Adapters(tmp_path).find("twin.safetensors") == top


def test_two_loras_of_one_name_are_those_of_an_image(tmp_path: Path) -> None:
    """Of the recorded hashes of one name only the last was known: --like warned of the other file."""
    adapters, paths = Adapters(), twins(tmp_path)
    recorded = adapters.recorded(request(*paths))
    assert recorded == {"lora_hashes": ", ".join(f"twin: {lora_hash(path)}" for path in paths)}
    assert adapters.differences(request(*paths), recorded) == []
    third = lora_files.write(tmp_path / "twin.safetensors", v1_layers(), seed=3)
    (line,) = adapters.differences(request(third), recorded)
    assert all(lora_hash(path) in line for path in (*paths, third))


def test_the_strength_of_an_images_lora_is_known(tmp_path: Path) -> None:
    """--like said nothing of a file whose header had got another alpha: its hash is of the values alone."""
    path, layers = tmp_path / "a.safetensors", {f"lora_unet_{LAYER}": (32, 32)}

    def write(alpha: int | None) -> None:
        settings = f'{{"unet.r": 4, "unet.lora_alpha": {alpha}}}'
        metadata = {"lora_adapter_metadata": settings} if alpha else None
        lora_files.write(path, layers, alpha=None, metadata=metadata)

    write(4)
    recorded = Adapters().recorded(request(path))
    assert recorded.keys() == {"lora_hashes", "lora_settings"}
    assert Adapters().differences(request(path), recorded) == []
    for alpha in (8, None):
        write(alpha)
        assert Adapters().differences(request(path), recorded) == [
            "a.safetensors had another strength, as its rank or alpha has changed"
        ]
    earlier = {"lora_hashes": recorded["lora_hashes"]}  # of images that do not record it
    assert Adapters().differences(request(path), earlier) == []


# Beside what makes a GPU fast


class Replayed:
    """Records as a CUDA graph does: what is computed is fixed, what it reads is read again."""

    def __call__(self, call: Callable) -> Recording:
        output = call()
        return Recording(lambda: output.copy_(call()), output)

    def renew(self) -> None:
        pass


def test_weights_stay_where_recordings_read_them(load: Callable, lora: Path, monkeypatch) -> None:
    pipeline, plainly = load(), load()
    monkeypatch.setattr("ldm.pipeline.adapters.in_place", lambda model: True)
    keep_casts(pipeline.model)
    graph_unet(pipeline.model, Replayed())
    keep_context(pipeline.model)
    keep_timesteps(pipeline.model)
    addresses = {name: p.data_ptr() for name, p in pipeline.model.named_parameters()}
    for one in ((), (lora,), ()):
        assert np.array_equal(*(pixels(each, request(*one))[0] for each in (pipeline, plainly)))
        assert addresses == {name: p.data_ptr() for name, p in pipeline.model.named_parameters()}


@pytest.mark.parametrize("by_layer", [False, True])
def test_weights_that_come_and_go(by_layer: bool, load: Callable, lora: Path, monkeypatch) -> None:
    pipeline, plainly = load(), load()
    monkeypatch.setattr("ldm.pipeline.adapters.in_place", lambda model: True)
    offload(pipeline.model, torch.device("cpu"), by_layer)
    for one in ((), (lora,), ()):
        assert np.array_equal(*(pixels(each, request(*one))[0] for each in (pipeline, plainly)))


# What cannot be


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{one}:x", "'x' is not a number from -100 to 100"),
        ("{one}:nan", "'nan' is not a number"),
        ("{one}:1:2:3", "has 3 weights"),
        (":0.5", "names no file"),
        ("one:0.5x", "'0.5x' is not a number"),
        ("absent.safetensors", "there is no LoRA 'absent.safetensors', neither as a path nor in"),
        ("{folder}/broken.safetensors", "broken.safetensors is cut short"),
        ("{folder}/empty.safetensors", "empty.safetensors is empty"),
        ("{folder}/wide.safetensors", "text of width 768, this model's of 32"),
        ("{folder}/nothing.safetensors", "none of its 1 layers is in this model"),
        ("{model}", "holds no LoRA that is known here"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    given: str, words: str, command, model: tuple[Path, Path], lora: Path, monkeypatch
) -> None:
    folder = lora.parent
    (folder / "broken.safetensors").write_bytes(lora.read_bytes()[:-100])
    (folder / "empty.safetensors").write_bytes(b"")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora_files.write(folder / "wide.safetensors", {key: (32, 768)})
    lora_files.write(folder / "nothing.safetensors", {"lora_unet_nowhere": (4, 4)})
    monkeypatch.setattr("ldm.pipeline.pipeline.load_model", lambda *_: pytest.fail("the model was loaded"))
    text = given.format(one=lora, folder=folder, model=model[1])
    refused(command("txt2img", "--config", model[0], "--ckpt", model[1], "--lora", text), words)


LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def changed_file(path: Path, part: str, values: torch.Tensor | None, **others: tuple[int, ...]) -> Path:
    """A file for LAYER, of which one tensor is another one, or lacks."""
    lora_files.write(path, {f"lora_unet_{LAYER}": (32, 32), **others})
    state = load_file(path)
    del state[f"lora_unet_{LAYER}.{part}"]
    if values is not None:
        state[f"lora_unet_{LAYER}.{part}"] = values
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("lora_up.weight", torch.ones(32, 4), "has lora_up [32, 4] and lora_down [3, 32], whose ranks"),
        ("lora_up.weight", torch.ones(32), "has lora_up [32], which is no matrix"),
        ("alpha", torch.ones(2), "has alpha [2], which is not one number"),
        ("lora_down.weight", None, "has no lora_down"),
    ],
)
def test_damaged_factors_are_said_before_the_model_is_loaded(
    part: str, values: torch.Tensor | None, words: str, command, model, tmp_path: Path, monkeypatch
) -> None:
    """The command ended with torch's error and exit code 1, when the model had been loaded."""
    monkeypatch.setattr("ldm.pipeline.pipeline.load_model", lambda *_: pytest.fail("the model was loaded"))
    path = changed_file(tmp_path / "bad.safetensors", part, values)
    what = "incomplete" if values is None else "damaged"
    result = command("txt2img", "--config", model[0], "--ckpt", model[1], "--lora", path)
    refused(result, f"{path} is {what}: its unet_{LAYER} {words}")


@pytest.mark.parametrize("kernels", ["onednn", "eager"])
@pytest.mark.parametrize("part", ["lora_up.weight", "alpha"])
def test_values_that_are_not_finite_are_an_error(
    part: str, kernels: str, load: Callable, tmp_path: Path
) -> None:
    """The image failed without a word of the file; with NaN as alpha some kernels made an image."""
    if kernels == "onednn" and not has_onednn(torch.float32):
        pytest.skip("no oneDNN here")
    nan = torch.full((32, 3), torch.nan) if part == "lora_up.weight" else torch.tensor(torch.nan)
    path = changed_file(tmp_path / "nan.safetensors", part, nan)
    pipeline = load(**FAST[kernels])
    plain = pixels(pipeline, request())[0]
    with pytest.raises(InputError, match=r"nan\.safetensors is damaged: its .*no finite numbers"):
        pixels(pipeline, request(path))
    assert np.array_equal(pixels(pipeline, request())[0], plain)


def test_text_encoders_that_are_not_used_may_be_damaged(load: Callable, tmp_path: Path) -> None:
    """Their training in float16 leaves NaN there, and the UNet's part is of use."""
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    path = lora_files.write(tmp_path / "text.safetensors", {f"lora_unet_{LAYER}": (32, 32), text: (128, 32)})
    state = load_file(path)
    state[f"{text}.lora_up.weight"].fill_(torch.nan)
    save_file(state, path)
    pixels(load(), request(f"{path}:1:0"))


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_factors_are_computed_only_for_kernels_that_take_them(
    precision: str, load: Callable, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were scaled and put together for bfloat16 and for 3x3 convolutions, too, and then thrown away."""
    dtype = torch.float32 if precision == "full" else torch.bfloat16
    if not has_onednn(dtype):
        pytest.skip("no oneDNN here")
    shapes = []

    def as_product(factors: list) -> tuple[torch.Tensor, torch.Tensor] | None:
        shapes.append(factors[0][0].parts["down"].shape)
        return original(factors)

    original = adapters_module.as_product
    monkeypatch.setattr(adapters_module, "as_product", as_product)
    pipeline = load(eager=False, kernels="onednn", precision=precision)
    pipeline.adapters.put_on(pipeline.model, request(lora))
    assert bool(shapes) == (precision == "full")
    assert not any(len(shape) == 4 and shape[2:] == (3, 3) for shape in shapes)


def test_further_folders_are_looked_into_first(tmp_path: Path) -> None:
    """By name and stem in any case, but not below; names may have a folder of another machine."""
    for folder in ("loras", "beside", "beside/below"):
        (tmp_path / folder).mkdir()
        lora_files.write(tmp_path / folder / "One.safetensors", v1_layers())
    lora_files.write(tmp_path / "beside/below/two.safetensors", v1_layers())
    adapters = Adapters(tmp_path / "loras")
    assert adapters.find("one") == tmp_path / "loras/One.safetensors"
    adapters.look_in([tmp_path / "absent", tmp_path / "beside"])
    for name in ("one", "One", "ONE.SAFETENSORS", "styles/one"):
        assert adapters.find(name) == tmp_path / "beside/One.safetensors"
    with pytest.raises(InputError, match="there is no LoRA 'two'"):
        adapters.find("two")
    (tmp_path / "beside/one.pt").touch()
    adapters.look_in([tmp_path / "beside"])
    with pytest.raises(InputError, match=r"'one' is the name of 2 files in .*: One\.safetensors, one\.pt"):
        adapters.find("one")


def test_linked_folders_are_searched(tmp_path: Path) -> None:
    """A folder of LoRAs on another disk, linked into the LoRA folder, was passed over."""
    folder, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    for place in (folder / "proper", elsewhere / "below"):
        place.mkdir(parents=True)
    lora_files.write(folder / "proper/one.safetensors", v1_layers())
    lora_files.write(elsewhere / "below/two.safetensors", v1_layers())
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "proper")  # once is enough
    (elsewhere / "circle").symlink_to(folder)
    adapters = Adapters(folder)
    assert adapters.find("one") == adapters.find("proper/one") == folder / "proper/one.safetensors"
    assert (
        adapters.find("two") == adapters.find("linked/below/two") == folder / "linked/below/two.safetensors"
    )
    assert {path for paths in adapters.names().values() for path in paths} == {
        folder / "proper/one.safetensors",
        folder / "linked/below/two.safetensors",
    }


def test_a_name_that_no_file_can_have(command, model: tuple[Path, Path], tmp_path: Path) -> None:
    """It ended in the system's OSError and exit code 1."""
    argv = ("--config", model[0], "--ckpt", model[1], "--lora", "x" * 300)
    refused(command("txt2img", *argv), "cannot be opened: File name too long")
    adapters = Adapters(tmp_path)
    adapters.look_in([tmp_path])
    with pytest.raises(InputError, match="File name too long"):
        adapters.find("x" * 300)


def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The LoRA folder was said to be empty. One below it may be for others only."""
    lora_files.write(tmp_path / "one.safetensors", v1_layers())
    closed = tmp_path / "below"
    closed.mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert Adapters(tmp_path).find("one") == tmp_path / "one.safetensors"
    closed = tmp_path
    with pytest.raises(InputError) as error:
        Adapters(tmp_path).find("one")
    assert str(error.value) == f"{tmp_path} cannot be opened: Permission denied"


def test_an_unknown_name_lists_the_nearest(command, model: tuple[Path, Path], lora: Path) -> None:
    words = "there is no LoRA 'onne'", "(--lora_folder); the nearest are one"
    argv = ("--config", model[0], "--ckpt", model[1], "--lora_folder", lora.parent, "--lora", "onne")
    refused(command("txt2img", *argv), *words)


def test_compile_on_a_cpu(load: Callable, lora: Path) -> None:
    pipeline = load()
    object.__setattr__(pipeline.options, "compile", True)
    with pytest.raises(InputError, match="lora and compile exclude each other on a CPU"):
        pipeline.resolve(request(lora))


# Commands


def test_resume_and_like(command, model: tuple[Path, Path], lora: Path) -> None:
    argv = (
        "--config",
        model[0],
        "--ckpt",
        model[1],
        "--steps",
        2,
        "--n_iter",
        1,
        "--n_samples",
        2,
        "--skip_grid",
    )
    first = command("txt2img", *argv, "--lora", f"{lora}:0.8")
    assert first.code == 0
    assert "one.safetensors: 12 of 12 layers, weight 0.8" in first.err
    first.paths[1].unlink()
    again = command("txt2img", *argv, "--lora", f"{lora}:0.8", "--resume")
    assert again.code == 0
    assert len(again.images) == 2
    assert command("txt2img", *argv, "--lora", f"{lora}:0.7", "--resume").code == 2
    folder = ("--lora_folder", lora.parent)
    like = command("txt2img", *argv[:4], "--like", again.paths[1], *folder, folder="like")
    assert np.array_equal(like.images[0], again.images[1])
    lora_files.write(lora, v1_layers(), seed=5)
    warned = command("txt2img", *argv[:4], "--like", again.paths[1], *folder, folder="warned")
    assert any(line.startswith("--like: that image is by another one.safetensors") for line in warned.err)
    lora.unlink()
    refused(
        command("txt2img", *argv[:4], "--like", again.paths[1], *folder, folder="absent"), "there is no LoRA"
    )
    plain = command("txt2img", *argv[:4], "--like", again.paths[1], "--lora", "none", folder="plain")
    assert not np.array_equal(plain.images[0], again.images[1])


def test_prompt_files_have_sets_of_their_own(command, model: tuple[Path, Path], lora: Path, tmp_path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(f'{{"prompt": "a", "lora": "{lora}:0.5"}}\n{{"prompt": "a", "seed": 42}}\n')
    argv = ("--config", model[0], "--ckpt", model[1], "--steps", 2, "--n_iter", 1, "--from-file", lines)
    result = command("txt2img", *argv, "--seed", 42)
    assert result.code == 0
    assert len(result.images) == 2
    assert not np.array_equal(*result.images)
