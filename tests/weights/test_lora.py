import json
import os
from pathlib import Path

import lora_files
import pytest
import torch
from lora_files import KINDS, RANK, difference, factors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.weights.lora import Change, LoraFile, merge
from ldm.weights.lora_names import Target, change_shape, layers_of

SHAPES = [(12, 8), (12, 8, 1, 1), (12, 8, 3, 3)]


def change(parts: dict[str, Tensor]) -> Change:
    layers, unknown = layers_of(f"lora_unet_x.{part}" for part in parts)
    assert not unknown
    return Change({part: parts[key.removeprefix("lora_unet_x.")] for part, key in layers["unet_x"].items()})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_what_the_papers_say(kind: str, shape: tuple[int, ...]) -> None:
    if "tucker" in kind and len(shape) == 2:
        pytest.skip("these are of convolutions")
    plain, parts = torch.randn(shape), factors(kind, shape)
    expected = plain + 0.7 * difference(parts, shape)
    torch.testing.assert_close(merge(plain, [(change(parts), 0.7, None)]), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_side_branch_that_was_trained_gives_the_same_output(shape: tuple[int, ...]) -> None:
    """x -> layer(x) + weight * alpha / rank * up(mid(down(x))), as LoCon is defined."""
    parts = factors("locon", shape)
    if len(shape) == 2:
        layer, x = nn.Linear(8, 12), torch.randn(5, 8)
        branch = x @ parts["lora_down.weight"].T @ parts["lora_up.weight"].T
    else:
        pad = shape[2] // 2
        layer, x = nn.Conv2d(8, 12, shape[2], padding=pad), torch.randn(2, 8, 6, 6)
        branch = nn.functional.conv2d(x, parts["lora_down.weight"])
        branch = nn.functional.conv2d(branch, parts["lora_mid.weight"], padding=pad)
        branch = nn.functional.conv2d(branch, parts["lora_up.weight"])
    with torch.no_grad():
        expected = layer(x) + 0.6 * 2.0 / RANK * branch
        layer.weight.copy_(merge(layer.weight, [(change(parts), 0.6, None)]))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", ["rows", "columns", "peft"])
def test_dora_gives_rows_or_channels_their_lengths(shape: tuple[int, ...], axis: str) -> None:
    plain, parts = torch.randn(shape), factors("lora", shape)
    moved = plain + difference(parts, shape)
    dims = [dim for dim in range(len(shape)) if dim != (1 if axis == "columns" else 0)]
    lengths = torch.rand(shape[1] if axis == "columns" else shape[0]) + 0.5
    sizes = [-1 if dim == (1 if axis == "columns" else 0) else 1 for dim in range(len(shape))]
    expected = moved / moved.square().sum(dims, keepdim=True).sqrt() * lengths.reshape(sizes)
    if axis == "peft":
        stored = lengths.reshape(1, -1, 1, 1) if len(shape) == 4 else lengths
        parts["lora_magnitude_vector"] = stored
    else:
        parts["dora_scale"] = lengths.reshape(sizes)
    torch.testing.assert_close(merge(plain, [(change(parts), 1.0, None)]), expected)
    half = merge(plain, [(change(parts), 0.5, None)])  # half of the way
    torch.testing.assert_close(half, (plain + expected) / 2)


def test_several_add_up_and_a_weight_of_zero_adds_nothing() -> None:
    plain, one, two = torch.randn(12, 8), factors("lora", (12, 8), 1), factors("lokr", (12, 8), 2)
    both = merge(plain, [(change(one), 0.5, None), (change(two), -0.3, None)])
    expected = plain + 0.5 * difference(one, (12, 8)) - 0.3 * difference(two, (12, 8))
    torch.testing.assert_close(both, expected)
    assert torch.equal(merge(plain, [(change(one), 0.0, None)]), plain)


def test_a_third_of_the_rows() -> None:
    plain, parts = torch.randn(24, 8), factors("lora", (8, 8))
    merged = merge(plain, [(change(parts), 1.0, 1)])
    assert torch.equal(merged[:8], plain[:8])
    assert torch.equal(merged[16:], plain[16:])
    torch.testing.assert_close(merged[8:16], plain[8:16] + difference(parts, (8, 8)))


def test_16_bits_are_rounded_once() -> None:
    plain, parts = torch.randn(12, 8).bfloat16(), factors("lora", (12, 8))
    merged = merge(plain, [(change(parts), 0.5, None), (change(parts), 0.5, None)])
    assert torch.equal(merged, (plain.float() + difference(parts, (12, 8))).bfloat16())


@pytest.mark.parametrize("kind", ["locon", "loha", "loha-tucker", "lokr", "lokr-tucker", "dora"])
def test_lycoris_makes_the_same_of_the_same_factors(kind: str) -> None:
    pytest.importorskip("lycoris")
    from lycoris.modules import loha, lokr
    from lycoris.modules.locon import LoConModule

    makers = {"loha": loha.LohaModule, "lokr": lokr.LokrModule}
    maker = makers.get(kind.partition("-")[0], LoConModule)
    conv = nn.Conv2d(8, 12, 3, padding=1)
    tucker = "tucker" in kind or kind == "locon"
    facts = {"decompose_both": tucker, "factor": 4} if "lokr" in kind else {}
    module = maker("x", conv, 1.0, 2, 1.0, use_tucker=tucker, weight_decompose=kind == "dora", **facts)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        weight = conv.weight.clone()
        x = torch.randn(2, 8, 6, 6)
        state = {name: value.detach() for name, value in module.state_dict().items() if "org" not in name}
        _, parts = layers_of(f"x.{name}" for name in state)[0].popitem()
        shapes = {part: state[key.removeprefix("x.")].shape for part, key in parts.items()}
        assert change_shape(shapes) == (12, 72)
        module.eval()
        expected = module(x)
        merged = merge(weight, [(change(state), 1.0, None)])
        mine = nn.functional.conv2d(x, merged, conv.bias, padding=1)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rs_lora", [False, True])
def test_lycoris_has_no_scale_for_whole_factors(rs_lora: bool) -> None:
    """Their alpha is the rank, or its power of 1.5 by rs_lora, and nothing in the file says the rank."""
    pytest.importorskip("lycoris")
    from lycoris.modules.lokr import LokrModule

    linear, parts = nn.Linear(8, 12), ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "", "t2")
    made = LokrModule("x", linear, 1.0, 16, 4.0, factor=4, full_matrix=True, rs_lora=rs_lora)
    state = {name: value.detach() for name, value in made.custom_state_dict().items()}
    state["lokr_w2"] = torch.randn_like(state["lokr_w2"])  # which is zero at first
    assert state.keys() == {"lokr_w1", "lokr_w2", "alpha"}
    with torch.no_grad():
        factors = [state.get(f"lokr_{part}") for part in parts]
        loaded = LokrModule.make_module_from_state_dict("x", linear, *factors, state["alpha"], None)
        x = torch.randn(5, 8)
        expected = loaded.eval()(x)
        merged = merge(linear.weight, [(change(state), 1.0, None)])
        torch.testing.assert_close(nn.functional.linear(x, merged, linear.bias), expected)


# Files


def test_a_match_says_what_is_left_out(tmp_path: Path) -> None:
    layers = {f"lora_unet_{x}": (12, 8) for x in "abcd"}
    path = lora_files.write(tmp_path / "some.safetensors", layers)
    known = {
        "unet_a": Target("a", (12, 8)),
        "unet_b": Target("b", (12, 8, 1, 1)),
        "unet_c": Target("c", (12, 9)),
    }
    match = LoraFile(path).match(known)
    assert list(match.layers) == ["unet_a", "unet_b"]
    assert match.total == 4
    assert (
        match.notice
        == "1 layer is not in this model (such as unet_d); 1 layer has another shape (such as unet_c)"
    )


def damaged(path: Path, changes: dict[str, Tensor | None], **shapes: tuple[int, ...]) -> Path:
    """A file of layers in which some tensors are others, or none."""
    lora_files.write(path, {f"lora_unet_{name}": shape for name, shape in shapes.items()})
    state = load_file(path)
    for key, values in changes.items():
        if values is None:
            del state[f"lora_unet_{key}"]
        else:
            state[f"lora_unet_{key}"] = values
    save_file(state, path)
    return path


def test_left_out_layers_are_incomplete_damaged_or_of_another_shape(tmp_path: Path) -> None:
    """A layer without lora_down had "another shape", and one whose ranks differ was an error of torch."""
    changes = {"b.lora_down.weight": None, "c.lora_up.weight": torch.ones(12, 4)}
    path = damaged(tmp_path / "some.safetensors", changes, a=(12, 8), b=(12, 8), c=(12, 8), d=(12, 8))
    known = {f"unet_{x}": Target(x, (12, 8 if x < "d" else 9)) for x in "abcd"}
    match = LoraFile(path).match(known)
    assert list(match.layers) == ["unet_a"]
    assert match.left_out == ("unet_b", "unet_c", "unet_d")
    assert match.notice == (
        "1 layer is incomplete (such as unet_b, which has no lora_down); "
        "1 layer is damaged (such as unet_c, which has lora_up [12, 4] and lora_down [3, 8], whose ranks 4 "
        "and 3 differ); 1 layer has another shape (such as unet_d)"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a.lora_up.weight": torch.ones(12, 4)}, "is damaged: its unet_a has lora_up [12, 4] and lora_down"),
        ({"a.lora_down.weight": None}, "is incomplete: its unet_a has no lora_down"),
        ({"a.alpha": torch.ones(2)}, "is damaged: its unet_a has alpha [2], which is not one number"),
        ({"a.dora_scale": torch.ones(5)}, "its unet_a has dora_scale [5] for 12x8"),
    ],
)
def test_a_file_of_damaged_layers(tmp_path: Path, changes: dict, words: str) -> None:
    """These were found out when the model had been loaded, in torch's words, without file and layer."""
    path = damaged(tmp_path / "bad.safetensors", changes, a=(12, 8))
    with pytest.raises(InputError) as error:
        LoraFile(path).match({"unet_a": Target("a", (12, 8))})
    assert str(error.value).startswith(f"{path} ")
    assert words in str(error.value)


def test_kronecker_factors_without_room_for_the_kernel(tmp_path: Path) -> None:
    """Their sides fit the weight as a matrix, and torch could not give them its axes."""
    parts = {"lora_unet_a.lokr_w1": torch.ones(4, 18), "lora_unet_a.lokr_w2": torch.ones(3, 4)}
    save_file(parts, tmp_path / "kron.safetensors")
    with pytest.raises(InputError, match="has a lokr_w2 of 4 columns for 12x8x3x3"):
        LoraFile(tmp_path / "kron.safetensors").match({"unet_a": Target("a", (12, 8, 3, 3))})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_of_rows_as_diffusers_exports_them(shape: tuple[int, ...]) -> None:
    """peft's lengths [1, o, 1, 1] under the name dora_scale were taken for lengths of channels."""
    plain, parts = torch.randn(shape), factors("lora", shape)
    lengths = torch.rand(12) + 0.5
    merged = []
    for form in (lengths.reshape(12, *(1 for _ in shape[1:])), lengths.reshape(1, 12, 1, 1)):
        merged.append(merge(plain, [(change({**parts, "dora_scale": form}), 1.0, None)]))
    assert torch.equal(*merged)


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, part: str, value: float) -> None:
    """Every image became NaN, and nothing said that the file was why."""
    bad = torch.tensor(value) if part == "alpha" else torch.ones(12, 3) if "up" in part else torch.ones(3, 8)
    if part != "alpha":
        bad = bad.half()
        bad[1, 1] = value
    path = damaged(tmp_path / "nan.safetensors", {f"a.{part}": bad}, a=(12, 8), b=(12, 8))
    file = LoraFile(path)
    with pytest.raises(InputError, match="no finite numbers") as error:
        file.change("unet_a")
    assert f"{path} is damaged: its lora_unet_a.{part} has" in str(error.value)
    file.change("unet_b")  # as those of a layer that is not used may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.int64], ids=str)
def test_large_values_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    """The sum of them is not, in their own type."""
    values = torch.full((400, 300), min(3e38, torch.finfo(dtype).max) if dtype.is_floating_point else 9)
    parts = {"lora_unet_a.diff": values.to(dtype), "lora_unet_a.alpha": torch.tensor(4)}
    save_file(parts, tmp_path / "large.safetensors")
    LoraFile(tmp_path / "large.safetensors").change("unet_a")


@pytest.mark.parametrize(
    ("width", "words"),
    [(2048, "Stable Diffusion XL"), (1024, "Stable Diffusion v2")],
)
def test_a_lora_for_another_family_is_named_with_both_widths(tmp_path: Path, width: int, words: str) -> None:
    layer = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    path = lora_files.write(tmp_path / "other.safetensors", {f"lora_unet_{layer}": (640, width)})
    with pytest.raises(InputError) as error:
        LoraFile(path).match({f"unet_{layer}": Target(layer, (640, 768))})
    for word in ("other.safetensors is a LoRA for", words, f"text of width {width}, this model's of 768"):
        assert word in str(error.value)


def test_a_file_of_which_nothing_matches(tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "odd.safetensors", {"lora_unet_nowhere": (4, 4)})
    with pytest.raises(InputError, match=r"none of its 1 layers is in this model .first unet_nowhere"):
        LoraFile(path).match({"unet_a": Target("a", (4, 4))})


def test_a_file_that_is_no_lora(tmp_path: Path) -> None:
    save_file({"first_stage_model.encoder.conv_in.weight": torch.ones(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=r"holds no LoRA .* it looks like an autoencoder alone"):
        LoraFile(tmp_path / "vae.safetensors")


def test_peft_keeps_alpha_beside_the_weights(tmp_path: Path) -> None:
    key = "base_model.model.mid_block.attentions.0.proj_in"
    parts = factors("lora", (12, 8), alpha=None)
    stored = {
        f"{key}.lora_A.weight": parts["lora_down.weight"],
        f"{key}.lora_B.weight": parts["lora_up.weight"],
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file(stored, path)
    for config, scale in (
        ("", 1.0),
        ('{"r": 3, "lora_alpha": 6}', 2.0),
        ('{"r": 4, "lora_alpha": 6, "use_rslora": true}', 3.0),
        ('{"r": 3, "lora_alpha": 6, "alpha_pattern": {"attentions.0.proj_in": 3}}', 1.0),
    ):
        if config:
            path.with_name("adapter_config.json").write_text(config)
        assert LoraFile(path).change("unet_mid_block_attentions_0_proj_in").scale == pytest.approx(scale)
    stored["x.alpha"] = torch.tensor(1.0)
    metadata = {"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 12}'}
    save_file(stored, tmp_path / "diffusers.safetensors", metadata)
    file = LoraFile(tmp_path / "diffusers.safetensors")
    assert file.change("unet_mid_block_attentions_0_proj_in").scale == 4.0


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        ("proj_in", 1.0),
        ("mid_block.attentions.0.proj_in", 1.0),
        ("^mid_block.*proj_(in|out)", 1.0),
        (r"attentions\.\d+\.proj_in", 1.0),
        ("unet.mid_block.attentions.0.proj_in", 1.0),
        ("in", 2.0),  # which is no name of a layer
        ("mid_block", 2.0),
        ("proj_(", 2.0),
        ("a{99999999999999999999}", 2.0),
        ("((.*)*)*x", 2.0),
        (".*.*.*.*x", 2.0),
        ("(_?|m)" * 20, 2.0),
    ],
)
def test_patterns_are_peft_s(tmp_path: Path, pattern: str, scale: float) -> None:
    """They were taken for bare endings: "in" was for proj_in, and no regular expression for anything."""
    parts = factors("lora", (12, 8), alpha=None)
    key = "base_model.model.mid_block.attentions.0.proj_in"
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"{key}.{name}.weight": parts[f"{part}.weight"] for name, part in names.items()}, path)
    config = {"r": 3, "lora_alpha": 6, "alpha_pattern": {pattern: 3, "proj_in$|attentions.0.proj_in": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert LoraFile(path).change("unet_mid_block_attentions_0_proj_in").scale == scale


def test_patterns_of_names_without_dots_are_endings(tmp_path: Path) -> None:
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attentions.0.proj_in": 3}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    name = "unet_mid_block_attentions_0_proj_in"
    path = lora_files.write(
        tmp_path / "a.safetensors", {f"lora_{name}": (12, 8)}, alpha=None, metadata=metadata
    )
    assert LoraFile(path).change(name).scale == 1.0


def test_each_network_has_settings_of_its_own(tmp_path: Path) -> None:
    """The UNet's rank and alpha were taken for the text encoder's, too."""
    layers = {"unet_a": (12, 8), "te_encoder_layers_0_mlp_fc1": (12, 8)}
    path = lora_files.write(
        tmp_path / "a.safetensors", {f"lora_{name}": shape for name, shape in layers.items()}, alpha=None
    )
    facts = {"unet.r": 16, "unet.lora_alpha": 16, "text_encoder.r": 8, "text_encoder.lora_alpha": 16}
    others = {"text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 4}
    of_both = {"r": 4, "lora_alpha": 12}
    for settings, scales in ((facts | others, [1.0, 2.0]), (of_both, [3.0, 3.0])):
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
        assert [LoraFile(path).change(name).scale for name in layers] == scales


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_damaged_settings_beside_a_file(tmp_path: Path, text: str) -> None:
    """They were passed over, and the file was merged at another strength."""
    path = lora_files.write(tmp_path / "adapter_model.safetensors", {"lora_unet_a": (12, 8)}, alpha=None)
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"adapter_config\.json (is not valid JSON|holds list instead)"):
        LoraFile(path)


def test_settings_in_a_file_that_are_damaged(tmp_path: Path) -> None:
    """Deeply nested ones ended in a RecursionError."""
    path = tmp_path / "a.safetensors"
    for text in ("{", "[]", "[" * 100_000):
        metadata = {"lora_adapter_metadata": text}
        lora_files.write(path, {"lora_unet_a": (12, 8)}, alpha=None, metadata=metadata)
        assert LoraFile(path).change("unet_a").scale == 1.0


def test_several_loras_in_one_file_are_refused(tmp_path: Path) -> None:
    """The last one was merged without a word."""
    keys = [f"unet.a.lora_{x}.{name}.weight" for x in "AB" for name in ("one", "two")]
    path = tmp_path / "two.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    with pytest.raises(InputError, match=r"two\.safetensors holds several LoRAs in one"):
        LoraFile(path)


def test_ranks_that_are_not_stored(tmp_path: Path) -> None:
    """A stride of 0 made a rank of any size of four bytes, and the memory was full when it was used."""
    up = torch.ones(1).expand(12, 10**9)
    down = torch.ones(1).expand(10**9, 8)
    torch.save({"lora_unet_a.lora_up.weight": up, "lora_unet_a.lora_down.weight": down}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"a\.pt is damaged: its 'lora_unet_a\.lora_up\.weight' has more"):
        LoraFile(tmp_path / "a.pt")


def test_settings_beside_a_file_that_make_no_scale(tmp_path: Path) -> None:
    """json reads NaN, which went into the weights, and numbers of any length, at which float fails."""
    path = lora_files.write(tmp_path / "adapter_model.safetensors", {"lora_unet_a": (12, 8)}, alpha=None)
    for alpha in ("NaN", "1" + "0" * 400):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 3, "lora_alpha": {alpha}}}')
        with pytest.raises(InputError, match="alpha over rank of unet_a is no finite number"):
            LoraFile(path).change("unet_a")
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6, "rank_pattern": [1]}')
    assert LoraFile(path).change("unet_a").scale == 2.0


def test_values_are_in_memory_of_their_own(tmp_path: Path) -> None:
    """They were in the mapped file, whose overwriting changed them, or ended the process with SIGBUS."""
    path = lora_files.write(tmp_path / "one.safetensors", {"lora_unet_a": (12, 8)})
    file, late = LoraFile(path), LoraFile(path)
    before = {name: value.clone() for name, value in file.tensors.items()}
    size = path.stat().st_size
    with path.open("r+b") as opened:  # in place
        opened.seek(size // 2)
        opened.write(b"\xff" * (size - size // 2))
    os.utime(path, (1, 1))  # the clock of the file system may not have ticked
    assert all(torch.equal(file.tensors[name], value) for name, value in before.items())
    assert file.has_changed
    with pytest.raises(InputError, match="has changed while it was in use"):
        late.change("unet_a")


def test_settings_beside_a_file_are_part_of_it(tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "adapter_model.safetensors", {"lora_unet_a": (12, 8)})
    file = LoraFile(path)
    assert not file.has_changed
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    assert file.has_changed
