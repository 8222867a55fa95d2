"""From the words of a command to requests and options."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from commands import Result, refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_lines import json_lines
from PIL import Image

from ldm.cli import tables
from ldm.cli.arguments import NOT_EMPTY, Arguments, gather, parse
from ldm.cli.like import read_image, settings_like
from ldm.cli.parser import Parser, add_options, flag_of, img2img_parser, txt2img_parser
from ldm.cli.prompts import Line, read_prompts
from ldm.errors import InputError
from ldm.fields import changed, listed_by_name, setting, settings_of
from ldm.pipeline.infotext import image_texts, parse_a1111, read_metadata
from ldm.pipeline.request import ImageRequest
from ldm.runs.run import run
from ldm.weights import loading

Command = Callable[..., Result]


def arguments(*words: str, with_init: bool = False) -> Arguments:
    parser = img2img_parser() if with_init else txt2img_parser()
    return gather(parser, vars(parser.parse_args(words)))


# --- a new setting is one field


@dataclass(frozen=True)
class Extended(ImageRequest):
    my_thing: float = setting(0.5, "a thing of mine", low=0, high=1, a1111="My thing", per_image=True)


def extended_parser() -> Parser:
    parser = txt2img_parser()
    parser.owner = Extended
    add_options(parser, Extended, leave_out=settings_of(ImageRequest))
    return parser


def test_a_new_setting_is_one_field(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took an option, a check, a key in three tables and a line in the metadata, each in another file."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "my_thing": 0.25}\n{"prompt": "a dog"}\n')
    words = (
        f"--config {model[0]} --ckpt {model[1]} --watermark none --safety off --steps 1 --n_iter 1".split()
    )
    words += ["--outdir", str(tmp_path / "out"), "--quiet"]
    command = parse(
        extended_parser(), [*words, "--my_thing", "0.75", "--from-file", str(tmp_path / "p.jsonl")]
    )
    pipeline = command.pipeline()
    assert run(pipeline, command.requests(pipeline), command.run) == 0
    files = [tmp_path / f"out/samples/0000{k}.png" for k in range(2)]
    recorded = [read_metadata(file) for file in files]
    assert [found["my_thing"] for found in recorded] == [0.25, 0.75]

    assert settings_like(recorded[0], (), (), Extended)["my_thing"] == 0.25
    again = parse(extended_parser(), [*words, "--like", str(files[0])])
    assert again.request.my_thing == 0.25
    assert (
        parse(extended_parser(), [*words, "--like", str(files[0]), "--my_thing", "1"]).request.my_thing == 1
    )
    text, _ = image_texts(recorded[0], Extended)
    assert "My thing: 0.25" in text
    assert parse_a1111(text, Extended)["my_thing"] == 0.25

    monkeypatch.setitem(tables.COMMANDS, "txt2img", extended_parser)
    assert "`--my_thing MY_THING` | 0.5 | a thing of mine" in tables.options_page()


@pytest.mark.parametrize("value", [1.5, "x", [0.5]])
def test_a_new_setting_checks_itself(value: object) -> None:
    """The command line knew the flags of its own classes only: the error was a KeyError."""
    command = gather(extended_parser(), {})
    with pytest.raises(InputError, match=r"^--from-file p, line 1: argument --my_thing: "):
        list(replace_lines(command, Line("a", (("my_thing", value),), "p, line 1")).requests(Unresolved()))


# --- lines with options of their own


class Unresolved:
    """A pipeline that takes requests as they are."""

    def check_size(self, request: ImageRequest) -> None:
        pass

    def resolve(self, request: ImageRequest) -> ImageRequest:
        return request


def replace_lines(command: Arguments, *lines: Line) -> Arguments:
    """The command with these lines for those of its prompt file."""
    command.__dict__["lines"] = list(lines)
    return command


def test_many_lines_cost_no_second_reading(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line with options parsed the command's words, and read the YAML, again."""
    calls = {"parse_args": 0, "read_section": 0}

    def counted(name: str, function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(Parser, "parse_args", counted("parse_args", Parser.parse_args))
    monkeypatch.setattr(loading, "read_section", counted("read_section", loading.read_section))
    lines = [
        json.dumps({"prompt": f"cat {k}", "seed": 10_000 + k, "steps": k % 50 + 1}) for k in range(10_000)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    words = ["--config", model[0], "--ckpt", model[1], "--from-file", tmp_path / "p.jsonl"]
    command = parse(txt2img_parser(), list(map(str, words)))
    requests = list(command.requests(command.pipeline()))
    assert [request.seed for request in requests] == list(range(10_000, 20_000))
    assert [request.prompt for request in requests[:2]] == ["cat 0", "cat 1"]
    assert {request.steps for request in requests} == set(range(1, 51))
    assert (requests[0].scale, requests[0].height) == (7.5, 16)
    assert calls["parse_args"] == 1
    assert calls["read_section"] <= 6


def test_switches_and_lists_of_a_line() -> None:
    options = (("timesteps", (900, 400)), ("zero_snr", True), ("negative-prompt", "x"))
    command = arguments("--scale", "3")
    with pytest.raises(InputError, match="no option 'negative-prompt' for a line; there are prompt, "):
        command._with_options(Line("a", options))
    request = command._with_options(Line("a", options[:2]))
    assert (request.timesteps, request.steps, request.zero_snr, request.scale) == ((900, 400), 2, True, 3)
    assert command._with_options(Line("a", (("timesteps", 500),))).timesteps == (500,)


def test_a_number_in_place_of_a_text() -> None:
    assert arguments()._with_options(Line("a", (("negative_prompt", 5),))).negative_prompt == "5"


def test_lines_that_come_again_have_the_next_seed() -> None:
    """Behind the largest seed comes 0, as in a run."""
    line, other = Line("a", (("seed", 2**63 - 1),)), Line("b")
    command = replace_lines(arguments(), line, line, other, other, line)
    seeds = [request.seed for request in command.requests(Unresolved())]
    assert seeds == [2**63 - 1, 0, None, None, 2**63 - 1]


@pytest.mark.parametrize("eta", ["x", 5, True, "nan"])
def test_ddim_eta_of_a_line_is_checked(eta: object) -> None:
    """It was no field, so nobody checked it: text ended in a ValueError, and 5 was taken."""
    with pytest.raises(InputError, match="argument --ddim_eta: "):
        list(replace_lines(arguments(), Line("a", (("ddim_eta", eta),), "p")).requests(Unresolved()))


def test_an_ignored_ddim_eta_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """The notice came for the command and again for its lines."""
    command = arguments("--dpm_solver", "--ddim_eta", "0.5")
    parse(txt2img_parser(), ["--dpm_solver", "--ddim_eta", "0.5"])
    list(replace_lines(command, Line("a"), Line("b")).requests(Unresolved()))
    assert caplog.messages == ["--ddim_eta 0.5 does nothing with --dpm_solver, as in the original"]


COMMANDS = {
    "txt2img": arguments("--outdir", "o", "--seed", "5"),
    "img2img": arguments("--init-img", "i.png", "--strength", "0.5", with_init=True),
    "many options": arguments(
        *["--sampler", "heun", "--s_churn", "1", "--schedule", "karras", "--rho", "5"],
        *["--H", "64", "--steps", "9"],
    ),
    "one stream": arguments("--rng", "compvis"),
}
SETTINGS = listed_by_name(ImageRequest)
ONE_FOR_ALL = {"prompt", "rng", "fixed_code", "start_seed"}
SET_BY_CHECKS = {"sampler", "schedule", "timesteps", "sigmas", "steps", "eta"}
NAMES = st.sampled_from([*SETTINGS, "ddim_eta"]) | st.sampled_from(
    [
        *(
            "seed=1 --outdir",
            "seed --outdir",
            "seed=1\n--outdir",
            "--outdir",
            "-outdir",
            "outdir",
            "o",
            "see",
        ),
        *(" seed", "help", "list_samplers", "from-file", "from_file", "prompt", "debug", "variant", "owner"),
        *(
            "negative-prompt",
            "",
            "steps=3",
            "H=",
            "fixed_code",
            "init_img",
            "strength",
            "allow_target",
            "rng",
        ),
        *("ckpt", "filename", "plms", "dpm_solver", "weights", "n_iter", "log_file"),
    ]
)
VALUES = (
    st.integers()
    | st.integers(0, 100)
    | st.floats()
    | st.floats(0, 1)
    | st.booleans()
    | st.lists(st.integers() | st.floats(0, 1000), max_size=4)
    | st.text(st.characters())
    | st.sampled_from(
        [
            *("-1", " -1", "-1.0", "--outdir=x", "1 --outdir x", "1\n--outdir=x", "--help", "-h", "--", "-"),
            *("", " ", "nan", "NaN", "inf", "1e999", "1e3", "9" * 4000, 10**4000, 2**63, 1e400, -0.0, "٣"),
            *("1_0", "%s", "%(x)s", "{steps}", "Euler a", "DPM++ 2M Karras", "plms", "ddim", "karras"),
            *("999,500,1", "14,3,1,0", "0.5", "64", "@file", None, [], [["--outdir"]], {"outdir": "x"}),
        ]
    )
)


@settings(max_examples=400, deadline=None)
@given(
    command=st.sampled_from(list(COMMANDS)),
    data=json_lines(st.dictionaries(NAMES | st.text(max_size=9), VALUES, max_size=3)),
)
@example(command="txt2img", data=b'{"prompt": "a cat", "embedding": []}')
def test_any_options_of_a_line_are_used_or_one_error(tmp_path_factory, command, data) -> None:
    """None is taken for another one, and nothing ends the program."""
    path, asked = tmp_path_factory.mktemp("fuzz") / "p.jsonl", COMMANDS[command]
    path.write_bytes(data)
    plain = asked.request.settings()
    with suppress(InputError):
        for line in read_prompts(str(path)):
            replace_lines(asked, line)
            (own,) = asked.requests(Unresolved())
            names = {SETTINGS[name].name if name in SETTINGS else "eta" for name, _ in line.options}
            assert all(name in SETTINGS or name == "ddim_eta" for name, _ in line.options)
            assert names.isdisjoint(ONE_FOR_ALL)
            found = own.settings()
            differing = {name for name in {*found, *plain} if found.get(name) != plain.get(name)}
            assert differing <= names | SET_BY_CHECKS | {"prompt"}
            assert own.prompt == line.prompt
            for name in names - SET_BY_CHECKS:
                assert isinstance(getattr(own, name), str | int | float | tuple)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", "--"),
        ("schedule", "--"),
        ("H", 8 * 10**400),  # an OverflowError, from math.isfinite
        ("W", 8 * 10**9),
        ("s_churn", 10**400),
        ("seed", -1),
        ("seed", " -1"),  # passed, as text: no generator takes it
        ("seed", True),
        ("sampler", 5),
        ("steps", "x"),
    ],
    ids=lambda part: str(part)[:12],
)
def test_values_that_slipped_through(name: str, value: object) -> None:
    """argparse made an empty list of --, and only some checks saw very large numbers or seeds in text."""
    line = Line("a cat", ((name, value),), "p.jsonl, line 1")
    with pytest.raises(InputError, match=r"^--from-file p\.jsonl, line 1: "):
        list(replace_lines(arguments(), line).requests(Unresolved()))


# --- the user's files


@pytest.mark.parametrize("path", ["folder", "file/below", "a" * 300], ids=["folder", "below", "long"])
@pytest.mark.parametrize("flag", ["--config", "--ckpt", "--from-file", "--like", "--init-img", "--log_file"])
def test_files_that_cannot_be_read_are_the_users_to_mend(
    command: Command, model: tuple[Path, Path], tmp_path: Path, flag: str, path: str
) -> None:
    """Exit code 2 and one line; any other OSError is ours, and 1."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    Image.new("RGB", (16, 16)).save(tmp_path / "init.png")
    argv = ["--config", model[0], "--ckpt", model[1], "--init-img", tmp_path / "init.png", "--steps", 1]
    refused(command("img2img", *argv, flag, tmp_path / path))


def test_settings_of_the_command_that_are_given() -> None:
    command = arguments("--scale", "3", "--tome", "0.5", "--n_iter", "7", "--weights", "raw")
    assert changed(command.runtime) == {"tome": 0.5}
    assert (command.request.scale, command.run.n_iter, command.weights) == (3, 7, "raw")
    assert command.run == replace(arguments().run, n_iter=7)


def test_the_image_of_like_is_read_with_the_commands_settings(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 3, Sampler: DDIM, Size: 16x16, My thing: 0.25")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_image(str(tmp_path / "a.png"), Extended)["my_thing"] == 0.25
    assert gather(extended_parser(), {"like": str(tmp_path / "a.png")}).request.my_thing == 0.25


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--plms --dpm_solver", "--plms has no effect beside --dpm_solver, as in the original"),
        ("--repeat 2", "--repeat is for the prompts of --from-file"),
        ("--quality 80", "--quality is for --format jpg and webp"),
        ("--skip_grid --n_rows 2", "--n_rows has no effect with --skip_grid"),
        ("--skip_save --filename {seed}", "--filename has no effect with --skip_save"),
        ("--scale 1 --cfg_rescale 0.5", "--cfg_rescale does nothing at --scale 1"),
        ("--scale 1 --guidance_end 0.5", "--guidance_end does nothing at --scale 1"),
        ("--sampler euler_ancestral --eta 0 --s_noise 1.1", "--s_noise 1.1 does nothing at --eta 0"),
        ("--sampler dpm_adaptive --steps 7", "--steps 7: dpm_adaptive chooses their number itself"),
    ],
)
def test_options_without_effect_are_named(command, model, argv: str, line: str) -> None:
    """They were ignored without a word."""
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--n_samples", 1, "--n_iter", 1]
    result = command("txt2img", *base, "--ddim_steps", 1, *argv.split())
    assert result.code == 0
    assert any(said.startswith(line) for said in result.err)


@pytest.mark.parametrize("name", NOT_EMPTY)
def test_an_option_without_a_value_is_named(name: str) -> None:
    """As an unset shell variable leaves it, it was no option at all, or this folder."""
    flag = flag_of(name)
    with pytest.raises(InputError, match=f"^{flag} is missing, or has no value$"):
        gather(img2img_parser(), {"init_img": "a.png", name: ""})


def test_a_prompt_may_be_empty() -> None:
    assert arguments("--prompt", "", "--sampler", "").request.prompt == ""


def test_two_spellings_of_an_option_in_a_line() -> None:
    """The last one counted, without a word."""
    command = replace_lines(arguments(), Line("a", (("steps", 5), ("ddim_steps", 9)), "p.jsonl, line 3"))
    with pytest.raises(
        InputError, match=r"^--from-file p.jsonl, line 3: steps and ddim_steps are one option"
    ):
        list(command.requests(Unresolved()))


@pytest.mark.parametrize(
    ("words", "own", "expected"),
    [
        ("--plms", {"sampler": "euler"}, {"sampler": "euler", "eta": None}),
        ("--dpm_solver", {"sampler": "heun"}, {"sampler": "heun"}),
        ("--eta 0.5", {"ddim_eta": 0.25}, {"eta": 0.25}),
        ("--ddim_eta 0.5", {"eta": 0.25}, {"eta": 0.25}),
    ],
)
def test_options_of_a_line_go_over_the_commands_other_words(words: str, own: dict, expected: dict) -> None:
    """--sampler euler and --plms named different samplers, though only the line was to have another one."""
    request = arguments(*words.split())._with_options(Line("a", tuple(own.items())))
    assert {name: getattr(request, name) for name in expected} == expected


PARTS = "a red cube AND a blue sphere :0.6"


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["--cfg_pp"], PARTS),
        (["--mimic_scale", "7"], PARTS),
        (["--cfg_pp", "--expand", "all"], "{a AND b|c}"),
        (["--cfg_pp", "--expand", "random"], "{a AND b|a AND c}"),
    ],
)
def test_what_does_not_go_with_a_prompt_is_found_in_files(words: list[str], prompt: str) -> None:
    """Such images were made, and could never be made again: --like refused what --prompt refuses."""
    command = arguments("--prompt_syntax", "a1111", "--ddim_eta", "0", *words)
    command = replace_lines(command, Line("a cube"), Line(prompt, place="and.txt, line 2"))
    if command.expansion is not None:
        command = replace_lines(command, *command.expansion.lines(command.lines))
    why = rf"^--from-file and.txt, line 2: {words[0]} with a prompt of several parts \(AND\)"
    with pytest.raises(InputError, match=why):
        list(command.requests(Unresolved()))


def test_no_controlnet_leaves_out_all_that_concerns_some() -> None:
    """--control none was no word, where --lora none and --embedding none are."""
    request = ImageRequest(
        control="none", control_preprocess=("canny",), control_resize="crop", canny_thresholds=(1, 2)
    )
    assert request == ImageRequest()
