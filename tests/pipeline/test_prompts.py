"""Prompts on their way to the UNet: chunks, weights, textual inversion, clip skip, schedules, composition."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Result, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_sampling import Recorder
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, Tokens
from ldm.optimize.context import keep_context
from ldm.optimize.graph import graph_unet
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline.drawing import put_in_order, sampling
from ldm.pipeline.prompts import PromptReader, Unit, chunks_of, weigh
from ldm.pipeline.settings.text import EmbeddingFile, Reading

Command = Callable[..., Result]
Load = Callable[..., Pipeline]
A1111, LONG = Reading("a1111"), Reading(long=True)
BOTH = Reading("a1111", long=True)
COMMA = 267
START, END = 49406, 49407


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    encoder = FrozenCLIPEmbedder(width=32, layers=3, heads=2)
    return PromptReader(lambda: encoder)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A textual inversion of three vectors, called "style" and "<s>"."""
    path = tmp_path / "style.safetensors"
    save_file({"<s>": torch.randn(3, 32, generator=torch.Generator().manual_seed(5))}, path)
    return path


def lengths(units: list[Unit], room: int = 75) -> list[int]:
    return [chunk.length for chunk in chunks_of(units, room, COMMA)]


def words(count: int, *commas: int) -> list[Unit]:
    """Tokens, those at `commas` (from 0) commas."""
    return [Unit(COMMA if k in commas else 320, 1.0) for k in range(count)]


# Chunks


@pytest.mark.parametrize(
    ("count", "commas", "expected"),
    [
        (0, (), [0]),
        (1, (), [1]),
        (75, (70,), [75]),
        (76, (), [75, 1]),
        (225, (), [75, 75, 75]),
        (76, (70,), [71, 5]),  # what follows a comma near the end goes on together
        (76, (55,), [56, 20]),
        (76, (54,), [75, 1]),  # more than 20 tokens back
        (76, (75,), [75, 1]),  # the comma itself is what does not fit
        (76, (74,), [75, 1]),
        (100, (60, 70), [71, 29]),
    ],
)
def test_the_chunks_of_a_long_prompt(count: int, commas: tuple[int, ...], expected: list[int]) -> None:
    """The web UI's rule with its default of 20 tokens, worked out by hand."""
    units = words(count, *commas)
    assert lengths(units) == expected
    assert [unit for chunk in chunks_of(units, 75, COMMA) for unit in chunk.units] == units


def test_chunks_of_prompts(reader: PromptReader) -> None:
    def kept(prompt: str, reading: Reading) -> list[list[int]]:
        rows = reader.layout(prompt, reading).ids.tolist()
        assert all(row[0] == START for row in rows)
        return [row[1 : row.index(END)] for row in rows]

    (cat,), (dog,) = reader.layout("cat", LONG).ids[:, 1], reader.layout("dog", LONG).ids[:, 1]
    assert kept("cat dog", Reading()) == kept("cat dog", BOTH) == [[cat, dog]]
    assert kept("cat BREAK dog", BOTH) == kept("cat BREAK dog", A1111) == [[cat], [dog]]
    assert kept("cat BREAK BREAK dog BREAK", BOTH) == [[cat], [], [dog]]
    assert kept("cat " * 80, LONG) == [[cat] * 75, [cat] * 5]
    assert kept("cat " * 80, Reading()) == [[cat] * 75]
    assert kept("cat " * 80 + "BREAK dog", A1111) == [[cat] * 75, [dog]]
    assert len(kept("cat BREAK dog", LONG)[0]) == 3  # a word like others without the language


def test_what_is_cut_off_is_said_without_the_marks(load: Load) -> None:
    pipeline = load()
    long = "(cat:1.2) " * 76 + "[dog]"
    assert pipeline.cut_off(long, A1111) == "cat dog"
    assert pipeline.cut_off(long, BOTH) == ""
    assert pipeline.cut_off("(cat) " * 30, A1111) == ""
    assert pipeline.cut_off("cat " * 76 + "BREAK " + "dog " * 76, A1111) == "cat … dog"
    assert pipeline.cut_off("cat " * 76) == "cat"


@given(st.text(alphabet="ab, ()[]:1.\\|", max_size=200))
@settings(max_examples=60)
def test_any_prompt_has_a_layout(reader: PromptReader, prompt: str) -> None:
    try:
        layout = reader.layout(prompt, BOTH)
    except InputError:
        return
    assert layout.ids.shape == layout.weights.shape == (len(layout.ids), 77)
    assert layout.cut_off == ()
    assert bool((layout.ids[:, 0] == START).all())
    assert bool((layout.ids == END).any(dim=1).all())


# Embeddings


@pytest.mark.parametrize("prompt", ["", "a cat on a mat, " * 3, "cat " * 75])
def test_short_prompts_are_what_they_were_bit_for_bit(load: Load, prompt: str) -> None:
    pipeline = load()
    plain = pipeline.embed(prompt)
    for reading in (LONG, A1111, BOTH):
        assert torch.equal(pipeline.embed(prompt, reading), plain)
    assert torch.equal(pipeline.embed(f"({prompt}:1.0)", BOTH), plain)
    assert not torch.equal(pipeline.embed("a (cat:1.3)", BOTH), pipeline.embed("a cat", BOTH))


def test_weights_multiply_and_keep_the_mean(load: Load) -> None:
    pipeline = load()
    plain, found = pipeline.embed("a cat on a mat")[0], pipeline.embed("a (cat:1.5) on [a mat]", A1111)[0]
    weights = torch.ones(77)
    weights[2], weights[4:6] = 1.5, 1 / 1.1
    expected = plain * weights[:, None]
    expected = expected * (plain.mean() / expected.mean())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.mean(), plain.mean())
    half = weigh(plain.bfloat16(), weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


def test_a_chunk_is_read_by_itself(load: Load) -> None:
    """Weights in one chunk leave the mean of the others alone."""
    pipeline = load()
    found = pipeline.embed("cat BREAK (dog:2)", BOTH)
    assert found.shape == (1, 154, 32)
    torch.testing.assert_close(found[:, :77], pipeline.embed("cat"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, 77:], pipeline.embed("(dog:2)", BOTH), rtol=1e-5, atol=1e-6)


def transformers_encoder(ours: FrozenCLIPEmbedder, extra: Tensor | None = None) -> torch.nn.Module:
    """transformers' text model with our weights, and with further rows of its token embedding."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    theirs = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes)).eval()
    state = ours.transformer.text_model.state_dict()
    getattr(theirs, "text_model", theirs).load_state_dict(state, strict=False)
    if extra is not None:
        theirs.resize_token_embeddings(49408 + len(extra), mean_resizing=False)
        with torch.no_grad():
            theirs.get_input_embeddings().weight[49408:] = extra
    return theirs


@torch.no_grad()
def test_textual_inversion_is_that_of_transformers(style: Path) -> None:
    """Diffusers adds tokens to the vocabulary, and their vectors to the text encoder's embedding."""
    torch.manual_seed(0)
    ours = FrozenCLIPEmbedder(width=32, layers=3, heads=2).eval()
    reader = PromptReader(lambda: ours)
    reading = Reading(embedding=(str(style),))
    (embedding,) = reader.embeddings(reading)
    theirs = transformers_encoder(ours, embedding.vectors)
    a, by = ours.tokenizer.encode("a cat"), ours.tokenizer.encode("by")
    ids = [START, *a, *by, 49408, 49409, 49410, COMMA]
    ids = torch.tensor([ids + [END] * (77 - len(ids))])
    expected = theirs(ids).last_hidden_state
    for prompt in ("a cat by style,", "A cat by STYLE ,", "a cat by <s>,"):
        torch.testing.assert_close(reader.embed(ours, prompt, reading), expected, rtol=1e-4, atol=1e-5)
    for prompt in ("a cat by styles,", "a cat by restyle,"):
        assert not reader.layout(prompt, reading).vectors


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_that_of_transformers(skip: int) -> None:
    """The hidden states are counted from the end, and the final normalisation comes after them."""
    torch.manual_seed(0)
    ours = FrozenCLIPEmbedder(width=32, layers=3, heads=2).eval()
    theirs = transformers_encoder(ours)
    ids = ours.tokenizer(["a cat"])
    states = theirs(ids, output_hidden_states=True).hidden_states[-skip]
    expected = getattr(theirs, "text_model", theirs).final_layer_norm(states)
    found = PromptReader(lambda: ours).embed(ours, "a cat", Reading(clip_skip=skip))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, ours(["a cat"])) == (skip == 1)


@torch.no_grad()
def test_v2_reads_its_penultimate_layer_unless_asked_for_another(style: Path) -> None:
    torch.manual_seed(0)
    miniature = {"width": 32, "layers": 3, "heads": 2}
    last, model = (FrozenOpenCLIPEmbedder(**miniature, layer=name) for name in ("last", "penultimate"))
    last.load_state_dict(model.state_dict())
    reader = PromptReader(lambda: model)
    assert torch.equal(reader.embed(model, "a cat", Reading(clip_skip=2)), model(["a cat"]))
    assert torch.equal(reader.embed(model, "a cat", Reading(clip_skip=1)), last(["a cat"]))
    layout = reader.layout("a style", Reading(embedding=(str(style),)))
    assert layout.ids[0, 5:].tolist() == [END] + [0] * 71  # padded as v2 was trained
    table = model.model.token_embedding.weight
    table[1:4] = reader.embeddings(Reading(embedding=(str(style),)))[0].vectors
    ids = layout.ids.clone()
    ids[0, 2:5] = torch.tensor([1, 2, 3])
    assert torch.equal(model(Tokens(layout.ids, layout.vectors)), model(Tokens(ids)))
    block = model.model.transformer.resblocks[-1]
    block.ln_1.weight.zero_()  # of a file without the unused layer
    with pytest.raises(InputError, match=r"--clip_skip 1: the checkpoint lacks"):
        reader.embed(model, "a cat", Reading(clip_skip=1))


def test_files_and_names() -> None:
    assert EmbeddingFile.parse("a/b.pt") == ("a/b.pt", "")
    assert EmbeddingFile.parse("a:b/c.PT:my name") == ("a:b/c.PT", "my name")
    assert EmbeddingFile.parse("C:\\e.safetensors:x") == ("C:\\e.safetensors", "x")
    assert EmbeddingFile.parse("learned") == ("learned", "")
    for text in ("", "/", "a.pt:", "a.pt:--"):
        with pytest.raises(FieldError, match="embedding"):
            EmbeddingFile.parse(text)


# Images


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tensor]]:
    """The timestep and the context of each call of the UNet."""
    found, plain = [], LatentDiffusion.apply_model

    def recorded(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        found.append((float(t[0]), cond))
        return plain(self, x, t, cond)

    monkeypatch.setattr(LatentDiffusion, "apply_model", recorded)
    return found


def request(prompt: str, **values: object) -> ImageRequest:
    values = {"steps": 4, "seed": 3, "prompt_syntax": "a1111"} | values
    return ImageRequest(prompt, **values)


def pixels(pipeline: Pipeline, *requests: ImageRequest) -> list[np.ndarray]:
    return [image.pixels.astype(int) for image in pipeline.generate(requests)]


def test_a_schedule_switches_at_its_step(load: Load, seen: list) -> None:
    pipeline = load(batch_size=2)
    pixels(pipeline, request("[cat:dog:2]"), request("[a:b:0.5]"), request("[a|b|c]", scale=1.0))
    contexts = [cond for _, cond in seen[:4]]
    embed = pipeline.embed
    rows = {
        "first": [embed(name)[0] for name in ("cat", "cat", "dog", "dog")],
        "second": [embed(name)[0] for name in ("a", "a", "b", "b")],
    }
    for k, context in enumerate(contexts):
        assert torch.equal(context[2], rows["first"][k])
        assert torch.equal(context[3], rows["second"][k])
    assert contexts[2] is contexts[3]  # one object, of which keys and values are kept
    alternated = [cond for _, cond in seen[4:]]
    assert [torch.equal(cond, embed(name)) for cond, name in zip(alternated, "abca", strict=True)] == [
        True
    ] * 4
    assert alternated[0] is alternated[3]


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral", "dpmpp_2m", "dpm_fast"])
def test_calls_within_a_step_go_by_their_noise_level(load: Load, seen: list, sampler: str) -> None:
    pipeline = load()
    made = request("[cat:dog:2]", sampler=sampler, scale=1.0)
    pixels(pipeline, made)
    discretization, run = pipeline.trajectory(pipeline.resolve(made))
    border = discretization.timestep(run.sigmas[2])
    for t, cond in seen:
        expected = "cat" if t > border + 1e-3 else "dog"
        assert torch.equal(cond, pipeline.embed(expected)), t
    assert len({id(cond) for _, cond in seen}) == 2


def test_a_second_pass_goes_on_from_1(load: Load, seen: list) -> None:
    pipeline = load(batch_size=2)
    values = {"hires": 2.0, "hires_strength": 1.0, "hires_upscaler": "latent", "scale": 1.0, "steps": 2}
    pixels(pipeline, request("[cat:dog:0.5]", **values), request("[cat:dog:1.5]", **values))
    names = [["cat" if torch.equal(row, pipeline.embed("cat")[0]) else "dog" for row in c] for _, c in seen]
    assert names == [["cat"], ["dog"], ["dog"], ["dog"], ["cat"], ["cat"], ["cat"], ["dog"]]


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_composition_is_the_weighted_sum(load: Load, scale: float) -> None:
    """The denoised latents of one call, by the formula, from plain calls of the model."""
    pipeline = load()
    made = pipeline.resolve(request("cat:0.7 AND (dog:1.2) :-0.3 AND a", negative_prompt="b", scale=scale))
    arguments = sampling(pipeline, [made], None, 0, None)
    denoiser, x = arguments["denoiser"], torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    sigma = 3.0
    c_in = (1 + sigma**2) ** -0.5
    t = torch.tensor([denoiser.discretization.timestep(sigma)])

    def eps(text: str) -> Tensor:
        return pipeline.model.apply_model(x * c_in, t, pipeline.embed(text, made.reading))

    uncond = eps("b")
    parts = [(0.7, eps("cat")), (-0.3, eps("(dog:1.2)")), (1.0, eps("a"))]
    guided = uncond + scale * sum(weight * (part - uncond) for weight, part in parts)
    torch.testing.assert_close(denoiser(x, sigma), x - sigma * guided, rtol=1e-4, atol=1e-5)


VARIED = [
    request("a cat AND a [dog|horse]:0.5", negative_prompt="[blurry:0.5]"),
    request("a (cat:1.3) BREAK " + "long " * 80 + "AND b:-0.2", long_prompts=True, seed=4),
    request("[a:b:0.25] AND c", scale=3.0, seed=5, long_prompts=True, negative_prompt="d BREAK e"),
    request("a cat"),
    request("[a:(b:1.2):2]", seed=8, negative_prompt="[c|d]"),
    request("plain (text", prompt_syntax="plain", seed=9),
    request("plain text " * 50, prompt_syntax="plain", long_prompts=True, seed=9),
    request("weighted as a whole:1.5"),
]


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_an_image_alone_is_that_of_a_batch(load: Load, sampler: str) -> None:
    requests = [one.twin(sampler=sampler) for one in VARIED]
    pipeline = load(batch_size=8)
    together = pixels(pipeline, *requests)
    for made, image in zip(requests, together, strict=True):
        assert np.abs(pixels(pipeline, made)[0] - image).max() <= 1
    assert len({image.tobytes() for image in together}) == len(VARIED)


def test_deepcache_computes_an_image_as_alone(load: Load) -> None:
    """A prompt that switched gave its whole batch a new context, after which all of it is computed anew."""
    requests = [
        request("a cube", steps=6),
        request("a [blue|red] cone", steps=6),
        request("a [cat:dog:2] cone", steps=6, seed=5),
    ]
    together = pixels(load(batch_size=3, deepcache=3), *requests)
    for made, image in zip(requests, together, strict=True):
        assert np.abs(pixels(load(batch_size=1, deepcache=3), made)[0] - image).max() <= 1
    assert len({made.batch_key() for made in requests}) == 3
    same = [request("[a:b:2]"), request("[c::0.5] d"), request("[e:f:2] g", negative_prompt="[h:i:2]")]
    assert len({made.batch_key() for made in same}) == 1
    assert request("[a:b:9]").batch_key() == request("a").batch_key()
    passes = {"hires": 2.0, "hires_strength": 0.5}
    assert request("[a:b:1.5]", **passes).batch_key() != request("a", **passes).batch_key()


@pytest.mark.parametrize("further", [{}, {"hires": 2.0, "hires_upscaler": "lanczos"}])
def test_long_prompts_are_repeated_for_their_own_negatives_alone(
    load: Load, seen: list, further: dict
) -> None:
    """Contexts of 7, 8 and 9 chunks in one batch became 504 of them."""
    values = {"prompt_syntax": "plain", "long_prompts": True, "steps": 2, "scale": 3.0, **further}
    requests = [request("cat, " * (37 * n - 1), seed=k, **values) for k, n in enumerate((3, 2, 3, 1))]
    together = pixels(load(batch_size=4), *requests)
    assert {context.shape[:2] for _, context in seen} == {(4, 3 * 77), (2, 2 * 77), (2, 77)}
    pipeline = load()
    for made, image in zip(requests, together, strict=True):
        assert np.abs(pixels(pipeline, made)[0] - image).max() <= 1
    assert len({image.tobytes() for image in together}) == 4


def test_latents_come_back_in_the_order_of_the_batch() -> None:
    for groups in ([[0, 1, 2]], [[1], [0, 2]], [[2], [0], [1]], [[1, 2], [0]]):
        latents = [torch.tensor(group)[:, None, None, None] for group in groups]
        put_in_order(latents, groups)
        assert torch.cat(latents).flatten().tolist() == [0, 1, 2]


def test_kept_keys_and_recordings_make_the_same_images(load: Load) -> None:
    plain = pixels(load(batch_size=8), *VARIED)
    pipeline = load(batch_size=8)
    keep_context(pipeline.model)
    recorder = Recorder()
    graph_unet(pipeline.model, recorder)
    for image, expected in zip(pixels(pipeline, *VARIED), plain, strict=True):
        assert np.array_equal(image, expected)
    assert recorder.replayed > 10


def test_and_is_a_word_within_a_negative_prompts_schedule() -> None:
    """The schedule was split at it and seen no more: the first step's text was that of all."""
    assert request("a cat", negative_prompt="[dog AND cat:bird:0.5]").changes_over_steps
    assert request("a cat", negative_prompt="a [bad AND ugly|dull]").changes_over_steps
    assert not request("a cat", negative_prompt="dog AND cat").changes_over_steps


@pytest.mark.parametrize("further", [{"cfg_rescale": 0.7}, {"guidance_start": 0.5}])
def test_what_guides_besides_sees_the_composed_prediction(load: Load, further: dict) -> None:
    """Of one part twice, by half each, it is what it is of the part alone."""
    pipeline = load()
    once, twice = request("[cat|a]", **further), request("[cat|a]:0.5 AND [cat|a]:0.5", **further)
    found = pixels(pipeline, once)[0]
    assert np.abs(found - pixels(pipeline, twice)[0]).max() <= 1
    assert np.abs(found - pixels(pipeline, request("[cat|a]"))[0]).max() > 0


def test_the_settings_make_the_image_again(
    command: Command, model: tuple[Path, Path], style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--config", model[0], "--ckpt", model[1], "--n_samples", 1, "--n_iter", 1, "--steps", 2)
    text = ("--prompt", "a [cat:dog:0.5] (style:1.2)", "--prompt_syntax", "a1111", "--clip_skip", 1)
    made = command("txt2img", *files, *text, "--long_prompts", "--embedding", f"{style}:style")
    assert made.code == 0
    (found,) = made.settings
    assert found["embedding"] == ["style.safetensors:style"]  # the folder is nobody's business
    assert (found["prompt_syntax"], found["long_prompts"], found["clip_skip"]) == ("a1111", True, 1)
    like = ("--config", model[0], "--ckpt", model[1], "--like", made.paths[0])
    refused(command("txt2img", *like, folder="again"), "style.safetensors:style", "--embedding")
    monkeypatch.chdir(style.parent)
    again = command("txt2img", *like, folder="again")
    assert again.code == 0
    assert np.array_equal(again.images[0], made.images[0])
    other = command("txt2img", *like, "--embedding", f"{style}:another", folder="other")
    assert "--embedding style.safetensors: no prompt has its name, 'another'" in other.err
    without = command("txt2img", *like, "--embedding", "none", folder="without")
    assert without.code == 0
    assert "embedding" not in without.settings[0]
    plain = command("txt2img", *files, "--prompt", "a cat", folder="plain")
    assert not {"embedding", "prompt_syntax", "long_prompts", "clip_skip"} & plain.settings[0].keys()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--prompt", "a (cat:x)", "--prompt_syntax", "a1111"), ("--prompt", "a (cat:^x)", "character 8")),
        (("--negative_prompt", "[a:b]", "--prompt_syntax", "a1111"), ("--negative_prompt", "[a:^b]")),
        (("--prompt_syntax", "comfy"), ("plain", "a1111")),
        (("--clip_skip", 0), ("--clip_skip", "at least 1", "1 … 99")[::2]),
        (("--clip_skip", 2), ("--clip_skip 2", "1 layers")),
        (("--embedding", "nothing.pt"), ("nothing.pt",)),
        (("--embedding", "wide.safetensors"), ("1024", "Stable Diffusion v2", "32")),
        (("--embedding", "damaged.pt"), ("damaged.pt",)),
        (("--embedding", "a.pt:"), ("--embedding", "name")),
    ],
)
def test_bad_input_is_one_line(
    command: Command,
    model: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"emb_params": torch.zeros(1, 1024)}, tmp_path / "wide.safetensors")
    (tmp_path / "damaged.pt").write_bytes(b"\x80nothing")
    monkeypatch.setattr("ldm.pipeline.pipeline.load_model", lambda *_: pytest.fail("the model was loaded"))
    refused(command("txt2img", "--config", model[0], "--ckpt", model[1], *argv), *words)


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt_syntax", "a1111"), ("long_prompts", True), ("clip_skip", 1), ("embedding", ("a.pt",))],
)
def test_another_text_encoder_is_refused(field: str, value: object) -> None:
    reader = PromptReader(lambda: BERTEmbedder(32, 1))
    reader.check(Reading())
    with pytest.raises(
        FieldError, match=rf"^{field}: this model's text encoder, BERTEmbedder, is none of CLIP"
    ):
        reader.check(ImageRequest("a", **{field: value}).reading)


def test_the_wholes_weight_is_noticed() -> None:
    (line,) = request("aspect ratio 16:9").text_notices()
    assert ":9" in line
    assert request("a AND b:2").text_notices() == []


def test_lora_tags_without_effect_are_noticed() -> None:
    """They were swallowed, or read as text, without a word."""
    (line,) = request("a cat <lora:x:0.8>", prompt_syntax="plain").text_notices()
    assert line.startswith("<lora:x:0.8> in the prompt is read as text")
    assert "--prompt_syntax a1111" in line
    for syntax in ("plain", "a1111"):
        (line,) = request("a cat", negative_prompt="b <lora:x>", prompt_syntax=syntax).text_notices()
        assert line.startswith("<lora:x> in the negative prompt loads no LoRA")
    assert request("a cat <lora:x:0.8>").text_notices() == []
    with pytest.raises(FieldError, match="prompt_to has a tag of the LoRA 'x'"):
        request("a cat", prompt_to="a dog <lora:x>", prompt_mix=0.5)


def test_an_embedding_that_changed_is_read_again(load: Load, style: Path) -> None:
    pipeline = load()
    made = ImageRequest("a style", embedding=(str(style),), steps=1, seed=1)
    first = pixels(pipeline, made)[0]
    save_file({"<s>": torch.full((1, 32), 2.0)}, style)
    assert not np.array_equal(pixels(pipeline, made)[0], first)


def test_more_vectors_than_a_chunk_has_room_for(load: Load, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "short.yaml", {"cond_stage_config.params.max_length": 8})
    save_file({"emb_params": torch.zeros(7, 32)}, tmp_path / "seven.safetensors")
    made = ImageRequest("seven", embedding=(str(tmp_path / "seven.safetensors"),))
    with pytest.raises(FieldError, match="7 vectors do not fit into the 6 tokens"):
        load(config).resolve(made)
    assert load().resolve(made).embedding == made.embedding
