"""From a YAML file and a checkpoint to a model: which files, and what their markers mean."""

import copy
import errno
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import omegaconf
import pytest
import tiny
import torch
from checkpoints import Tiny, save
from commands import refused
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.modules.encoders import tokenizer
from ldm.weights import checkpoint, loading, prediction
from ldm.weights.convert import Conversion, convert
from ldm.weights.description import describe, prediction_of
from ldm.weights.families import FAMILIES, family_of, supported
from ldm.weights.loading import (
    advised_scale,
    choose_model,
    find,
    load_model,
    read_config,
    read_section,
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny.state_dict()


@pytest.fixture
def load(tmp_path, weights):
    """Loads the miniature: its config with `changes`, its file with more tensors."""

    def call(extra=None, changes=None, **options):
        path = tmp_path / "model.safetensors"
        save_file(weights | (extra or {}), path)
        return load_model(tiny.model_section(changes or {}), path, **options)

    return call


MARKED = "is marked as v-prediction"


def test_unmarked_file(load, caplog):
    model = load()
    assert (model.parameterization, model.zero_terminal_snr, model.weights_used) == ("eps", False, "raw")
    assert not caplog.messages


@pytest.mark.parametrize("ztsnr", [False, True])
def test_marked_file_predicts_v(load, caplog, ztsnr):
    """Such a file was run as eps without a notice: the images were noise."""
    markers = {"v_pred": torch.tensor([])} | ({"ztsnr": torch.tensor([])} if ztsnr else {})
    model = load(markers)
    assert (model.parameterization, model.zero_terminal_snr) == ("v", ztsnr)
    first, *rest = caplog.messages
    assert f"{MARKED}: its UNet is taken to predict v" in first
    assert [message.partition(" is marked as ")[2] for message in rest] == (
        ["trained with zero terminal SNR: its schedule is rescaled"] if ztsnr else []
    )


def test_marked_file_and_config_agree(load, caplog):
    model = load({"v_pred": torch.tensor([])}, {"parameterization": "v"})
    assert model.parameterization == "v"
    assert not caplog.messages


def test_marked_file_and_config_at_odds(load, caplog):
    """What the user has written counts, and is said to be at odds with the file."""
    model = load({"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, {"parameterization": "eps"})
    assert (model.parameterization, model.zero_terminal_snr) == ("eps", False)
    first, second = caplog.messages
    assert f"{MARKED}, at odds with the config's parameterization: eps, which is used" in first
    assert "zero terminal SNR: ignored, as its UNet predicts eps" in second


def test_zero_terminal_snr_of_a_config_that_says_v(load, caplog):
    assert load({"ztsnr": torch.ones(1)}, {"parameterization": "v"}).zero_terminal_snr
    assert len(caplog.messages) == 1


def averaged(weights) -> dict[str, torch.Tensor]:
    """The weights of the UNet once more, as averages that are all zero."""
    names = [name for name in weights if name.startswith("model.")]
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.zeros_like(weights[name])
        for name in names
    }


@pytest.mark.parametrize(
    ("use_ema", "which", "used"),
    [(False, None, "raw"), (True, None, "ema"), (True, "raw", "raw"), (False, "ema", "ema")],
)
def test_weights_used(load, weights, use_ema, which, used):
    """An image's settings had null for the weights that the config chose."""
    model = load(averaged(weights), {"use_ema": use_ema}, which=which)
    assert model.weights_used == used
    assert (model.model.diffusion_model.out[2].weight.abs().sum() == 0) == (used == "ema")


def test_weights_of_a_config_that_does_not_say(weights, tmp_path):
    """RunwayML's inpainting YAML has no `use_ema`: a file without averages was refused."""
    config = copy.deepcopy(tiny.MODEL)
    del config["params"]["use_ema"]
    for state, used in ((weights, "raw"), (weights | averaged(weights), "ema")):
        save_file(state, tmp_path / "file.safetensors")
        assert load_model(config, tmp_path / "file.safetensors").weights_used == used


def test_a_missing_vocabulary_is_found_before_the_weights_are_loaded(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "ROOT", tmp_path)
    monkeypatch.setattr(checkpoint, "load_weights", None)
    config = copy.deepcopy(tiny.MODEL)
    config["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {"n_embed": 32, "n_layer": 1},
    }
    save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(InputError, match=r"models/ldm/text2img-large/vocab\.txt is missing: put "):
        load_model(config, tmp_path / "file.safetensors")


def test_more_weights_than_the_model_has(load, weights, caplog):
    """Merges and textual inversions trained into a file were refused."""
    model = load({"embedding_manager.string_to_param.x": torch.zeros(2, 32)})
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    assert len(caplog.messages) == 1
    assert "'embedding_manager.string_to_param.x'" in caplog.text


@pytest.fixture
def parsed(monkeypatch) -> list[Path]:
    """The YAML files that are read, one after the other."""
    paths, load = [], omegaconf.OmegaConf.load
    monkeypatch.setattr(omegaconf.OmegaConf, "load", lambda path: paths.append(path) or load(path))
    return paths


def test_yaml_is_read_once(tmp_path, parsed):
    """It was parsed anew for every line of a prompt file."""
    path = tiny.write_config(tmp_path / "model.yaml")
    for _ in range(3):
        assert read_config(path) == tiny.MODEL
        assert advised_scale(path, 7.5) == 7.5
    assert parsed == [path]


def test_a_changed_yaml_is_read_again(tmp_path, parsed):
    path = tmp_path / "model.yaml"
    path.write_text("sampling: {scale: 3.0}")
    assert advised_scale(path, 7.5) == 3
    path.write_text("sampling: {scale: 12.0}")
    assert advised_scale(path, 7.5) == 12
    path.write_text("sampling: {scale: 13.0}")
    os.utime(path, ns=(0, 0))  # the clock of a file system may not have moved on
    assert advised_scale(path, 7.5) == 13
    assert len(parsed) == 3


def test_sections_are_copies(tmp_path):
    path = tiny.write_config(tmp_path / "model.yaml")
    read_config(path)["params"].clear()
    assert read_config(path) == tiny.MODEL


def test_relative_paths_are_of_the_working_folder(tmp_path, monkeypatch):
    for name, scale in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.yaml").write_text(f"sampling: {{scale: {scale}}}")
        os.utime(tmp_path / name / "m.yaml", ns=(0, 0))
        monkeypatch.chdir(tmp_path / name)
        assert advised_scale(Path("m.yaml"), 7.5) == scale


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not valid YAML"),
        ("model: ${b}", "is not valid YAML"),
        ("[1, 2]", "has no model: section"),
        ("model: 3", "has no model: section"),
        ("model: {params: {}}", "has no target"),
        ("\0", "is not valid YAML"),
    ],
)
def test_unusable_yaml(tmp_path, monkeypatch, content, words):
    """The message names the file as the user did."""
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_config(Path("model.yaml"))
    assert " model.yaml " in f" {caught.value} "


def test_only_the_section_that_is_read_is_resolved(tmp_path):
    """A training file was refused, as its data: section refers to a variable of another machine."""
    path = tmp_path / "a.yaml"
    data = "data:\n  root: ${oc.env:A_VARIABLE_OF_ANOTHER_MACHINE}\n  batch: ${trainer.batch}\n"
    path.write_text(f"width: 4\nmodel:\n  target: x\n  params:\n    a: ${{width}}\n{data}")
    assert read_config(path) == {"target": "x", "params": {"a": 4}}
    with pytest.raises(InputError, match=r"is not valid YAML: .*A_VARIABLE_OF_ANOTHER_MACHINE"):
        loading.read_section(path, "data")


def test_yaml_that_is_not_there(tmp_path):
    for path, why in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "a\0b", "No such file"),
    ):
        with pytest.raises(InputError, match=why):
            read_section(path, "model")


def refuse(*_, **__):
    """In place of a method of Path, as the superuser, whom tests may run as, is permitted everything."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_what_the_system_refuses(tmp_path, monkeypatch):
    """`exists()` raises the OSError of a folder without permission, which is an internal error elsewhere."""
    path = tiny.write_config(tmp_path / "model.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        for call in (
            lambda: find(str(path)),
            lambda: choose_model(str(path), None),
            lambda: choose_model(None, str(path)),
            lambda: choose_model(None, None),
            lambda: read_section(path, "model"),
            lambda: load_model(tiny.model_section({}), path),
        ):
            with pytest.raises(InputError, match="Permission denied"):
                call()
    for name in ("x" * 300, "x/" * 4000):
        with pytest.raises(InputError, match="cannot be opened: File name too long"):
            choose_model(None, name)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be opened: "):
        choose_model(str(tmp_path / "loop"), None)


def test_find(tmp_path, monkeypatch):
    """The working folder comes first, then the repository."""
    monkeypatch.setattr(loading, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    assert find("m.yaml") == tmp_path / "repository" / "m.yaml"
    (tmp_path / "m.yaml").touch()
    assert find("m.yaml") == Path("m.yaml")


def test_native_size():
    assert describe(tiny.MODEL).native_size == 16
    assert describe({"params": {}}).native_size == 512
    with pytest.raises(InputError, match="does not describe a latent diffusion model"):
        describe({"params": {"image_size": "large"}})


def test_advised_scale_that_is_no_number(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("sampling: {scale: high}")
    with pytest.raises(InputError, match="'high' of its sampling: section is not a number"):
        advised_scale(path, 7.5)


# --- which model a file is, and which config it gets


CONFIGS = Path(loading.ROOT) / "configs"
RUN = {family.name: family for family in reversed(FAMILIES) if family.config}


def tiny_file(path: Path, channels: int = 4, context: int = 768, form: str = "safetensors", **extra) -> Path:
    """A file with the names and shapes that show a family, and little more."""
    return save(Tiny(channels, context).state_dict() | extra, path, form)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """One with configs and nothing linked, and a working folder elsewhere."""
    (tmp_path / "repository/models/ldm").mkdir(parents=True)
    (tmp_path / "repository/configs").symlink_to(CONFIGS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(loading, "ROOT", tmp_path / "repository")
    return tmp_path / "repository"


NUMBERS = {
    "Stable Diffusion v1": (4, 768),
    "Stable Diffusion v1 inpainting": (9, 768),
    "Stable Diffusion v2": (4, 1024),
    "Stable Diffusion v2 inpainting": (9, 1024),
    "Stable Diffusion v2 depth": (5, 1024),
    "the Stable Diffusion x4 upscaler": (7, 1024),
    "LAION-400M text2img-large": (4, 1280),
    "the bundled model": (4, 64),
    "the bundled inpainting model": (9, 64),
    "the bundled depth model": (5, 64),
    "the bundled x4 upscaler": (7, 64),
}


BUNDLED = [Path(family.bundled).parent.name for family in FAMILIES if family.bundled]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_file_is_known_by_its_place_and_content(tmp_path, name):
    """Those of one task have the same shapes, and differ in the size of their images or in what they predict.

    A copy was taken for the first of them.
    """
    path = loading.ROOT / f"models/{name}/model.safetensors"
    (tmp_path / "linked.safetensors").symlink_to(path)
    shutil.copy(path, tmp_path / "copied.safetensors")
    for each in (path, tmp_path / "linked.safetensors", tmp_path / "copied.safetensors"):
        files = choose_model(None, str(each), None)
        assert files.config.resolve() == loading.ROOT / f"configs/scenes/{name}.yaml"
        assert (files.notice, files.undecided) == (None, False)


@pytest.mark.parametrize("name", BUNDLED)
def test_a_converted_bundled_file_states_its_size(tmp_path, name):
    """Without that it was taken for the first model of its shapes, and drew rubbish in another size."""
    target = tmp_path / "mine.safetensors"
    converted(loading.ROOT / f"models/{name}/model.safetensors", target)
    config = loading.ROOT / f"configs/scenes/{name}.yaml"
    assert native_size(target) == describe(read_config(config)).native_size


def native_size(path: Path) -> int:
    return describe(read_config(choose_model(None, str(path), None).config)).native_size


def converted(source: Path, target: Path, **merge: Path | float) -> Path:
    convert(Conversion(source, target, "safetensors", **merge), lambda size: nullcontext(lambda count: None))
    return target


def test_a_merged_model_has_the_size_of_what_was_merged_into_it(tmp_path):
    """A sibling of 64 pixels that stated its size kept it after scenes-128 - scenes-64 had been added."""
    small, large = (loading.ROOT / f"models/{name}/model.safetensors" for name in ("scenes-64", "scenes-128"))
    sibling = loading.ROOT / "models/scenes-64-inpainting/model.safetensors"
    stated = converted(sibling, tmp_path / "stated.safetensors")
    mine = converted(small, tmp_path / "mine.safetensors")
    for source in (sibling, stated):
        target = tmp_path / f"sum-{source.stem}.safetensors"
        assert native_size(converted(source, target, other=large, base=small, ratio=1.0)) == 128
    assert native_size(converted(small, tmp_path / "both.safetensors", other=mine)) == 64


@pytest.mark.parametrize(
    ("stated", "size"),
    [
        ("64x64", 64),
        ("128x128", 128),
        (" 64x96 ", 64),
        ("", 128),
        ("512x512", 128),
        ("64", 128),
        ("axb", 128),
    ],
)
def test_the_stated_size_of_images_chooses_between_models_of_one_shape(tmp_path, stated, size):
    metadata = {"modelspec.resolution": stated} if stated else None
    for channels in (4, 5, 9):
        path = tmp_path / f"{channels}.safetensors"
        save_file(Tiny(channels, 64).state_dict(), path, metadata)
        assert native_size(path) == size


@pytest.mark.parametrize("name", RUN)
def test_a_checkpoint_alone_gets_its_config(tmp_path, name):
    assert NUMBERS.keys() == RUN.keys()
    path = tiny_file(tmp_path / "some.safetensors", *NUMBERS[name])
    files = choose_model(None, str(path), RUN[name].task)
    assert (files.config.resolve(), files.weights) == (loading.ROOT / RUN[name].config, path)
    assert files.notice == f"{path} is taken for {name}: its config is {RUN[name].config}"
    assert files.undecided == (name in ("Stable Diffusion v2", "the bundled model"))
    assert choose_model(None, str(path), None) == files
    described = describe(read_config(files.config))
    assert (described.in_channels, described.context_dim) == NUMBERS[name]
    assert described.task == RUN[name].task
    assert choose_model(str(files.config), str(path), None).config == files.config


def folder_of(path: Path, kind: str, **unet: int) -> Path:
    """A diffusers folder of a miniature, whose UNet has other numbers than the rest."""
    from diffusers import UNet2DConditionModel
    from diffusers_pipelines import tiny_pipeline

    pipeline = tiny_pipeline(kind)
    pipeline.save_pretrained(path)
    UNet2DConditionModel.from_config({**pipeline.unet.config, **unet}).save_pretrained(path / "unet")
    return path


@pytest.mark.parametrize(
    ("kind", "channels", "context", "name", "config"),
    [
        ("v1", 4, 768, "Stable Diffusion v1", "v1-inference.yaml"),
        ("v2", 4, 1024, "Stable Diffusion v2", "v2-inference.yaml"),
        ("v2-v", 4, 1024, "Stable Diffusion v2", "v2-inference-v.yaml"),
        ("inpainting", 9, 1024, "Stable Diffusion v2 inpainting", "v2-inpainting-inference.yaml"),
    ],
)
def test_a_diffusers_folder_alone_gets_its_config(tmp_path, kind, channels, context, name, config):
    """Its scheduler's config says what the UNet predicts."""
    folder = folder_of(tmp_path / "f", kind, in_channels=channels, cross_attention_dim=context)
    files = choose_model(None, str(folder), None)
    assert (files.config.name, files.weights, files.undecided) == (config, folder, False)
    assert f"{folder} is taken for {name}" in files.notice
    predicts = "v" if kind == "v2-v" else "eps"
    assert prediction_of(read_config(files.config), folder, False).parameterization == predicts


def test_a_diffusers_folder_of_no_known_width(tmp_path):
    with pytest.raises(InputError, match="unlisted kind: give its config with --config"):
        choose_model(None, str(folder_of(tmp_path / "f", "v1")))


def test_the_v1_weights_that_are_linked_need_no_notice(repository):
    (repository / "models/ldm/stable-diffusion-v1").mkdir()
    path = tiny_file(repository / "models/ldm/stable-diffusion-v1/model.ckpt", form="zip")
    for ckpt in (None, str(path), "models/ldm/stable-diffusion-v1/model.ckpt"):
        assert choose_model(None, ckpt) == loading.ModelFiles(
            repository / "configs/stable-diffusion/v1-inference.yaml", path
        )


HINTS = {
    "v2-1_768-ema-pruned.safetensors": "v",
    "768-v-ema.ckpt": "v",
    "my-vpred-merge.safetensors": "v",
    "stable-diffusion-v2-768/model.safetensors": "v",
    "v2-1_512-ema-pruned.ckpt": "eps",
    "512-base-ema.ckpt": "eps",
    "sd-v2-base/model.ckpt": "eps",
    "illuminati.safetensors": None,
    "v768.safetensors": None,
    # sizes and versions, which were taken for hints, so that an eps-model was run as one of v
    "photo_512x768_v3.safetensors": None,
    "dreamlike_768_v2.ckpt": None,
    "wide_512x768_v.ckpt": None,
}


@pytest.mark.parametrize("name", HINTS)
def test_names_show_eps_or_v(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    path = tiny_file(tmp_path / name, 4, 1024)
    files = choose_model(None, str(path))
    expected = {"v": "v2-inference-v.yaml", "eps": "v2-inference.yaml", None: "v2-inference.yaml"}
    assert files.config.name == expected[HINTS[name]]
    assert files.undecided == (HINTS[name] is None)
    config = read_config(files.config)
    assert prediction_of(config, path, files.undecided).parameterization == HINTS[name]
    if HINTS[name]:
        assert f"that predicts {HINTS[name]} by the name " in files.notice


def test_a_link_is_known_by_what_it_leads_to(tmp_path):
    path = tiny_file(tmp_path / "768-v-ema.safetensors", 4, 1024)
    (tmp_path / "model.safetensors").symlink_to(path)
    assert choose_model(None, str(tmp_path / "model.safetensors")).config.name == "v2-inference-v.yaml"


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "eps"),
        ({"prediction_type": "v_prediction"}, "v"),
        ({"prediction_type": "flow"}, None),
    ],
)
def test_metadata_show_eps_or_v(tmp_path, metadata, found):
    state = {name: t.contiguous() for name, t in Tiny(context=1024).state_dict().items()}
    save_file(state, tmp_path / "w", metadata=metadata)
    hint = prediction.file_hints(tmp_path / "w").hint
    assert (hint and hint.parameterization) == found
    assert hint is None or hint.why == f"its metadata ({next(iter(metadata))})"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model: {target: a.B, params: {parameterization: v}}", "v"),
        ("model: {params: {parameterization: eps}}", "eps"),
        ("model: {params: {}}", None),
        ("model: [v]", None),
        ("{", None),
    ],
)
def test_a_config_beside_a_file_shows_eps_or_v(tmp_path, weights, text, found):
    """Models of v1's layout that predict v come with one and nothing else; their images were noise."""
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.with_suffix(".yaml").write_text(text)
    hint = prediction.file_hints(path).hint
    assert (hint and hint.parameterization) == found
    model = load_model(tiny.model_section({}), path)
    assert model.parameterization == (found or "eps")


def test_the_config_beside_a_links_target_is_read(tmp_path, weights):
    """Only one beside the link itself was, and the README has people link their files."""
    (tmp_path / "downloads").mkdir()
    save_file(weights, tmp_path / "downloads/real.safetensors")
    (tmp_path / "model.ckpt").symlink_to(tmp_path / "downloads/real.safetensors")
    (tmp_path / "downloads/real.yaml").write_text("model: {params: {parameterization: v}}")
    hint = prediction.file_hints(tmp_path / "model.ckpt").hint
    assert (hint.parameterization, hint.why) == ("v", "the file real.yaml beside it")
    (tmp_path / "model.yaml").symlink_to(tmp_path / "model.yaml")  # a loop, which says nothing
    assert prediction.file_hints(tmp_path / "model.ckpt").hint == hint


@pytest.mark.parametrize(("steps", "found"), [(875_000, "eps"), (110_000, None)])
@pytest.mark.parametrize("legacy", [False, True])
def test_steps_of_training_show_eps(tmp_path, steps, found, legacy):
    content = {"global_step": steps, "state_dict": Tiny(context=1024).state_dict()}
    torch.save(content, tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    hint = prediction.file_hints(tmp_path / "w", by_name=True).hint
    assert (hint and hint.parameterization) == found
    assert prediction.file_hints(tmp_path / "w").hint is None


@pytest.mark.parametrize("marker", ["v_pred", "ztsnr"])
def test_markers_show_v(tmp_path, marker):
    path = tiny_file(tmp_path / "512-base.safetensors", 4, 1024, **{marker: torch.tensor([])})
    files = choose_model(None, str(path))
    assert (files.config.name, files.undecided) == ("v2-inference-v.yaml", False)
    found = prediction_of(read_config(files.config), path)
    assert found == ("v", marker == "ztsnr")


# --- refusals


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"conditioner.embedders.0.x": 1}, "looks like Stable Diffusion XL, which cannot be run: give a"),
        ({"model.diffusion_model.joint_blocks.0.x": 1}, "looks like Stable Diffusion 3, which cannot"),
        ({"double_blocks.0.img_attn.qkv.weight": 1}, "looks like FLUX, which cannot be run"),
        ({"noise_augmentor.data_mean": 1}, "looks like Stable unCLIP, which cannot be run"),
        ({"first_stage_model.quantize.embedding.weight": 1}, "with a VQ autoencoder, which cannot be run"),
        ({"control_model.x": 1}, "looks like a ControlNet, which cannot be run"),
        ({"lora_te_x.lora_down.weight": 1}, "looks like a LoRA, which cannot be run"),
        ({"encoder.conv_in.weight": 1}, "looks like an autoencoder alone, which cannot be run"),
        ({"x": 1}, "looks like an unknown model, which cannot be run"),
        ({"model.diffusion_model.x": 1}, "of an unlisted kind: give its config with --config"),
    ],
)
def test_families_that_cannot_be_run(tmp_path, state, words):
    path = save({name: torch.zeros(n) for name, n in state.items()}, tmp_path / "w", "safetensors")
    with pytest.raises(InputError, match=words) as caught:
        choose_model(None, str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "unlisted" in words or supported() in str(caught.value)


@pytest.mark.parametrize(
    ("name", "task", "command"),
    [
        ("Stable Diffusion v2 depth", "text", "depth2img.py"),
        ("the Stable Diffusion x4 upscaler", "text", "upscale.py"),
        ("the Stable Diffusion x4 upscaler", "inpaint", "upscale.py"),
        ("the bundled depth model", "upscale", "depth2img.py"),
        ("Stable Diffusion v1", "depth", "txt2img.py or img2img.py"),
        ("Stable Diffusion v1", "upscale", "txt2img.py or img2img.py"),
        ("Stable Diffusion v2 inpainting", "depth", "inpaint.py"),
    ],
)
def test_the_wrong_command(tmp_path, name, task, command):
    path = tiny_file(tmp_path / "w", *NUMBERS[name])
    with pytest.raises(InputError) as caught:
        choose_model(None, str(path), task)
    assert str(caught.value) == f"{path} is {name}: use {command}"
    config = str(loading.ROOT / RUN[name].config)
    with pytest.raises(InputError, match=f"{RUN[name].config} is of .*: use {command}"):
        choose_model(config, None, task)


@pytest.mark.parametrize("name", ["Stable Diffusion v1 inpainting", "the bundled inpainting model"])
def test_inpainting_models_make_images_of_text_and_others_inpaint(tmp_path, name):
    path = tiny_file(tmp_path / "w", *NUMBERS[name])
    assert choose_model(None, str(path), "text").config.resolve() == loading.ROOT / RUN[name].config
    plain = tiny_file(tmp_path / "plain")
    assert choose_model(None, str(plain), "inpaint").config.resolve() == loading.ROOT / loading.V1_CONFIG


@pytest.mark.parametrize(
    ("config", "channels", "context", "words"),
    [
        ("v1-inference.yaml", 4, 1024, "looks like Stable Diffusion v2 (its config is v2-inference.yaml or"),
        (
            "v1-inference.yaml",
            9,
            768,
            "v1 inpainting (its config is v1-inpainting-inference.yaml), the model",
        ),
        ("v2-inference.yaml", 4, 768, "Stable Diffusion v1 (its config is v1-inference.yaml), the model is"),
        ("v2-inference.yaml", 4, 768, "768 instead of 1024 numbers a word"),
        ("v2-inpainting-inference.yaml", 4, 1024, "4 instead of 9 input channels of its UNet"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, config, channels, context, words):
    path = tiny_file(tmp_path / "w", channels, context)
    with pytest.raises(InputError) as caught:
        choose_model(str(CONFIGS / "stable-diffusion" / config), str(path), None)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_config_with_another_autoencoder(tmp_path):
    levels = {f"first_stage_model.encoder.down.{i}.x": torch.zeros(1) for i in range(4)}
    path = tiny_file(tmp_path / "w", 7, 1024, **levels)
    with pytest.raises(InputError, match="8 instead of 4 pixels to a latent"):
        choose_model(str(CONFIGS / "stable-diffusion/x4-upscaling.yaml"), str(path), "upscale")


def test_refusals_of_a_command(command, tmp_path):
    """One line and exit code 2, before torch has read a weight."""
    for channels, context, words in (
        (5, 1024, "is Stable Diffusion v2 depth: use depth2img.py"),
        (7, 64, "is the bundled x4 upscaler: use upscale.py"),
        (8, 768, "looks like InstructPix2Pix, which cannot be run"),
        (4, 2048, "looks like Stable Diffusion XL, which cannot be run"),
    ):
        path = tiny_file(tmp_path / "w.safetensors", channels, context)
        refused(command("txt2img", "--ckpt", path), str(path), words)
    path = tiny_file(tmp_path / "w.safetensors", 4, 1024)
    config = CONFIGS / "stable-diffusion/v1-inference.yaml"
    words = "looks like Stable Diffusion v2 (its config is v2-inference.yaml or v2-inference-v.yaml)"
    refused(command("txt2img", "--ckpt", path, "--config", config), str(path), words)


# --- linked weights


def link(repository: Path, folder: str, name: str = "model.ckpt") -> Path:
    path = repository / "models/ldm" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # it is not opened before the weights are read
    return path


def test_linked_weights_in_their_order(repository):
    """Each is found when those that come before it are gone."""
    for task, folders in {
        "text": ["v1", "v2-base", "v2-768"],
        "inpaint": ["v1-inpainting", "v2-inpainting", "v1", "v2-base", "v2-768"],
        "depth": ["v2-depth"],
        "upscale": ["x4-upscaler"],
    }.items():
        links = {folder: link(repository, f"stable-diffusion-{folder}") for folder in folders}
        for path in links.values():
            files = choose_model(None, None, task)
            assert files.weights == path
            assert files.config.is_file()
            assert (files.notice is None) == ("v1/" in str(path))
            assert not files.undecided
            path.unlink()
    assert choose_model(None, None).weights == repository / loading.BUNDLED_WEIGHTS


@pytest.mark.parametrize("task", ["inpaint", "depth", "upscale"])
def test_the_bundled_model_of_a_task(repository, task):
    files = choose_model(None, None, task)
    family = next(family for family in FAMILIES if family.bundled and family.task == task)
    assert files.config == repository / family.config
    assert files.weights == repository / family.bundled
    assert files.notice.startswith("No weights are linked at models/ldm/stable-diffusion-")
    assert f"using {family.name} of coloured solids" in files.notice
    assert choose_model(family.config, None, task).weights == files.weights


def test_the_only_checkpoint_of_a_folder(repository):
    path = link(repository, "stable-diffusion-v2-depth", "512-depth-ema.ckpt")
    link(repository, "stable-diffusion-v2-depth", "notes.txt")
    assert choose_model(None, None, "depth").weights == path
    link(repository, "stable-diffusion-v2-depth", "other.safetensors")
    assert "bundled" in str(choose_model(None, None, "depth").notice)
    index = link(repository, "stable-diffusion-v2-depth", "model_index.json")
    assert choose_model(None, None, "depth").weights == index.parent


def test_a_config_alone_finds_its_familys_weights(repository):
    config = "configs/stable-diffusion/v2-inference-v.yaml"
    expected = repository / "models/ldm/stable-diffusion-v2-768/model.ckpt"
    assert choose_model(config, None).weights == expected
    single = link(repository, "stable-diffusion-v2-768", "v2-1_768.safetensors")
    assert choose_model(config, None).weights == single
    laion = choose_model(loading.LAION_CONFIG, None)
    assert laion.weights == repository / "models/ldm/text2img-large/model.ckpt"
    assert laion.config == repository / "configs/latent-diffusion/txt2img-1p4B-eval.yaml"


# --- eps or v, by a test


class PredictsV(torch.nn.Module):
    """Turns the UNet of an eps-model into one that predicts v, by the definitions of both."""

    def __init__(self, model):
        super().__init__()
        self.unet, self.alphas = model.model.diffusion_model, model.alphas_cumprod
        self.in_channels = self.unet.in_channels

    def forward(self, x, t, context=None, y=None):
        eps = self.unet(x, t, context=context, y=y)
        a = self.alphas[t.long()][:, None, None, None]
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return a.sqrt() * eps - (1 - a).sqrt() * x0


@pytest.fixture(scope="module")
def bundled():
    files = choose_model(loading.SMALL_CONFIG, None)
    return load_model(read_config(files.config), files.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_on_pure_noise_shows_eps(bundled, dtype):
    try:
        bundled.model.to(dtype)
        assert prediction.noise_correlation(bundled) > 0.95
        assert prediction.measured_prediction(bundled, "f").parameterization == "eps"
    finally:
        bundled.model.float()


def test_the_output_on_pure_noise_shows_v(bundled, monkeypatch):
    monkeypatch.setattr(bundled.model, "diffusion_model", PredictsV(bundled))
    assert prediction.noise_correlation(bundled) < 0.2
    assert prediction.measured_prediction(bundled, "f").parameterization == "v"


TWIN = next(f for f in FAMILIES if f.bundled and f.predicts == "v" and f.task == "text")


@pytest.mark.parametrize("path", [loading.SMALL_WEIGHTS, TWIN.bundled])
def test_the_bundled_pair_by_the_test(tmp_path, path, caplog):
    """Other files of their weights, whose names show nothing, with one config."""
    target = tmp_path / "mine.safetensors"
    save_file(load_file(loading.ROOT / path), target, {"modelspec.resolution": "64x64"})
    files = choose_model(None, str(target))
    assert files.undecided
    config = read_config(files.config)
    assert prediction_of(config, target, True) == (None, False)
    model = load_model(config, target, undecided=True)
    expected = "v" if path == TWIN.bundled else "eps"
    assert model.parameterization == expected
    (message,) = caplog.messages
    assert f"{target} predicts {expected} by a test: its output on pure noise correlates" in message


def test_no_test_without_need(load, monkeypatch):
    """The user's config, or a hint, decides."""
    monkeypatch.setattr(prediction, "noise_correlation", lambda *_: pytest.fail("the model was run"))
    assert load().parameterization == "eps"
    assert load({"v_pred": torch.tensor([])}, undecided=True).parameterization == "v"
    assert load(changes={"parameterization": "v"}, undecided=True).parameterization == "v"


def test_a_family_by_its_header_alone(tmp_path):
    """Of a file, a tensor or an outline only the shapes count."""
    path = tiny_file(tmp_path / "w", 9, 1024)
    family, shapes = loading.recognise_file(path)
    assert family.name == "Stable Diffusion v2 inpainting"
    assert shapes[:2] == (9, 1024)
    assert family == family_of(Tiny(9, 1024).state_dict())
