"""`scripts/batch_score.py`: files of prompts in, images and files of answers out."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SCRIPTS, Result, pixels, refused, script
from live_service import base64_png, decoded
from PIL import Image
from run_helpers import wait_for

from ldm.runs.manifest import MANIFEST, RUNS, append
from ldm.runs.options import RunOptions

Command = Callable[..., Result]


@pytest.fixture
def batch(command: Command, model: tuple[Path, Path], tmp_path: Path) -> Command:
    """Scores files, given by name and content, in a folder of their own."""
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--safety", "off", "--steps", 2]

    def call(*argv: object, folder: str = "out", **files: str) -> Result:
        for name, content in files.items():
            write(tmp_path, name, content)
        given = [] if "--input" in argv else ["--input", tmp_path / "in"]
        return command("batch_score", *base, *given, *argv, folder=folder)

    return call


def write(tmp_path: Path, name: str, content: str) -> Path:
    """A file in/a.csv for the name a_csv."""
    stem, _, suffix = name.rpartition("_")
    path = tmp_path / "in" / f"{stem}.{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def answers(result: Result, name: str) -> list[dict[str, Any]]:
    return json.loads((result.folder / "answers" / f"{name}.json").read_text())


def table(data: list, columns: tuple[str, ...] = ("prompt",), **parts: Any) -> str:
    return json.dumps({"input_data": {"columns": columns, "data": data, **parts}})


def test_files_of_both_forms(batch: Command, command: Command, model: tuple[Path, Path]) -> None:
    """The images are those of txt2img with the same settings, and line k of all has seed SEED + k."""
    parameters = {"num_inference_steps": 3, "guidance_scale": 0.5}
    result = batch(
        "--seed",
        20,
        a_csv='\ufeffprompt,negative_prompt,seed,scale\r\na cat,,7,\r\n"a dog, ""big""",a cow,,3\r\n\r\n',
        b_json=table(["a cat", "a bird"], index=["x", "y"], parameters=parameters),
    )
    assert result.code == 0, result.err
    assert result.out == [str(result.folder / "answers" / f"{name}.json") for name in ("a.csv", "b.json")]
    assert answers(result, "a.csv") == [
        {"prompt": "a cat", "generated_image": "samples/00000.png", "nsfw_content_detected": False},
        {"prompt": 'a dog, "big"', "generated_image": "samples/00001.png", "nsfw_content_detected": False},
    ]
    assert [one["index"] for one in answers(result, "b.json")] == ["x", "y"]
    settings = [(one["prompt"], one["seed"], one["steps"], one["scale"]) for one in result.settings]
    expected = [("a cat", 7, 2, 7.5), ('a dog, "big"', 21, 2, 3), ("a cat", 22, 3, 1), ("a bird", 23, 3, 1)]
    assert settings == expected
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--n_iter", 1, "--n_samples", 1]
    for k, (prompt, seed, steps, scale) in enumerate(expected):
        own = ["--prompt", prompt, "--seed", seed, "--steps", steps, "--scale", scale]
        own += ["--negative_prompt", "a cow"] if k == 1 else []
        same = command("txt2img", *base, *own, folder=f"txt2img-{k}")
        assert np.abs(result.images[k] - same.images[0]).max() <= 1


def test_lines_with_faults_do_not_keep_the_others(batch: Command) -> None:
    """And the seeds of these do not depend on them."""
    good, bad = "a cat,\na dog,\n", "a cat,\na cow,x\na dog,\nshort\n,3\n"
    whole = batch("--seed", 5, a_csv=f"prompt,seed\n{good}")
    result = batch("--seed", 5, folder="faulty", a_csv=f"prompt,seed\n{bad}")
    assert result.code == 1
    found = answers(result, "a.csv")
    files = [one["generated_image"] for one in found]
    assert files == ["samples/00000.png", None, "samples/00001.png", None, "samples/00002.png"]
    assert [one["nsfw_content_detected"] for one in found] == [False, None, False, None, False]
    assert found[1]["error"] == "seed: x is not a whole number in range: 0 … 9,223,372,036,854,775,807"
    assert found[3] == {
        "prompt": "short",
        "generated_image": None,
        "nsfw_content_detected": None,
        "error": "1 values for the 2 columns prompt, seed",
    }
    assert np.array_equal(result.images[0], whole.images[0])
    assert [one["seed"] for one in result.settings] == [5, 7, 3]
    named = [line for line in result.err if "a.csv, line" in line]
    assert [line.partition(", line ")[2].partition(":")[0] for line in named] == ["3", "5"]
    assert result.err[-1] == "2 of 5 lines have no image, because of their faults"


def test_lines_that_are_all_faulty(batch: Command) -> None:
    result = batch(a_csv="prompt,H\n" + "a cat,17\n" * 12)
    assert result.code == 1
    assert len(answers(result, "a.csv")) == 12
    assert "height 17 is not a multiple of 8" in result.err[0]
    assert result.err[10] == "2 more lines have faults; the answers name them"
    assert not (result.folder / "samples").exists()


def test_images_by_name_and_in_base64(batch: Command, tmp_path: Path) -> None:
    start = Image.effect_noise((64, 64), 90).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (tmp_path / "in").mkdir()
    start.save(tmp_path / "in" / "start.png")
    mask.save(tmp_path / "in" / "mask.png")
    lines = [
        "prompt,image,mask,seed,strength",
        "a cat,start.png,mask.png,3,",
        f'a cat,{base64_png(start)},"data:image/png;base64,{base64_png(mask)}",3,',
        "a cat,start.png,,3,0.2",
        "a cat,missing.png,,3,",
        f"a cat,{base64_png(start)[:400]},,3,",
        "a cat,,mask.png,3,",
    ]
    result = batch("--mask_blur", 0, a_csv="\n".join(lines))
    assert result.code == 1
    by_name, by_content, _ = result.images
    assert np.array_equal(by_name, by_content)
    assert np.array_equal(by_name[:, 32:], np.asarray(start)[:, 32:])
    assert [one["strength"] for one in result.settings] == [1.0, 1.0, 0.2]
    faults = [one.get("error", "") for one in answers(result, "a.csv")[3:]]
    assert faults[0].startswith("image missing.png is neither a file that is there nor an image in base64")
    assert faults[1]
    assert faults[2] == "mask without image"


def test_images_in_the_answers(batch: Command) -> None:
    result = batch("--base64", a_csv="prompt\na cat\na dog\n")
    for found, file in zip(answers(result, "a.csv"), result.paths, strict=True):
        assert np.array_equal(np.asarray(decoded(found["generated_image"])), pixels(file))


def test_a_run_that_is_there_is_not_made_again(batch: Command) -> None:
    files = {"a_csv": "prompt\na cat\na dog\n"}
    first = batch(**files)
    times = [path.stat().st_mtime_ns for path in first.paths]
    first.paths[1].unlink()
    again = batch("--resume", **files)
    assert again.code == 0
    assert [path.stat().st_mtime_ns for path in again.paths][:1] == times[:1]
    assert len(again.paths) == 2
    assert batch("--resume", a_csv="prompt\na cat\na bird\n").code == 2
    new = batch(**files)  # without it, further files
    found = [one["generated_image"] for one in answers(new, "a.csv")]
    assert found == ["samples/00002.png", "samples/00003.png"]


def test_a_drawn_seed_is_that_of_the_run_that_is_taken_up(batch: Command) -> None:
    """It was that of the folder's last run, and the command refused the run before that one."""
    first, second = {"a_csv": "prompt,scale\na cat,\n,x\na dog,\n"}, {"a_csv": "prompt\na bird\n"}
    (line,) = (line for line in batch("--seed", -1, **first).err if line.startswith("seed "))
    batch("--seed", -1, a_csv="prompt,tiling\na cat,x\n")  # a setting that the first run's do not have
    made = batch("--seed", -1, **second)  # into the same folder
    seeds = [settings["seed"] for settings in made.settings]
    assert (seeds[1] - seeds[0], f"seed {seeds[0]}") == (2, line)
    for path in made.paths:
        path.unlink()
    for files in (first, second):
        again = batch("--seed", -1, "--resume", **files)
        assert not [line for line in again.err if line.startswith("seed ")]
    assert [settings["seed"] for settings in again.settings] == [*seeds[:2], seeds[3]]  # not the one between


def test_answers_are_of_the_commands_own_run(batch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of another run that had started in the folder meanwhile were answered for our prompts."""
    from ldm.runs import run as runs

    own = runs.run

    def with_another(pipeline: object, requests: object, options: RunOptions, **given: Any) -> int:
        code = own(pipeline, requests, options, **given)
        other, outdir = {"run": "0" * 12}, Path(options.outdir)
        append(outdir / RUNS, other | {"first": 1, "images": 1, "settings": {}})
        append(outdir / MANIFEST, other | {"image": 0, "file": "samples/00001.png", "nan": False})
        return code

    monkeypatch.setattr(runs, "run", with_another)
    for resume in ([], ["--resume"]):
        result = batch("--seed", 1, *resume, a_csv="prompt\na cat\n")
        assert [one["generated_image"] for one in answers(result, "a.csv")] == ["samples/00000.png"]


def test_a_dry_run_writes_nothing(batch: Command) -> None:
    content = f"prompt,image\na cat,{base64_png(Image.new('RGB', (64, 64)))}\na dog,\n"
    result = batch("--dry_run", a_csv=content)
    assert (result.code, result.files) == (0, [])
    assert len(result.out) == 2


def test_a_full_disk_is_no_fault_of_a_line(batch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line with an image in base64 was reported as faulty, and the others were made."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script("batch_score"), "write_whole", full)
    result = batch(a_csv=f"prompt,image\na cat,{base64_png(Image.new('RGB', (64, 64)))}\na dog,\n")
    assert (result.code, result.files) == (2, [])
    (message,) = result.err
    assert message.endswith(".png: No space left on device; make room")


def test_json_lines_of_images(batch: Command) -> None:
    """`--json` prints a line for each image, and of `--plan` what that found, but no name of a file."""
    content = "prompt\na cat\na dog\n"
    made = batch("--json", a_csv=content)
    assert [json.loads(line)["prompt"] for line in made.out] == ["a cat", "a dog"]
    assert len(answers(made, "a.csv")) == 2
    (plan,) = batch("--plan", "--json", a_csv=content, folder="planned").out
    assert json.loads(plan)["images"] == 2


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, model: tuple[Path, Path]) -> None:
    """kill -9 in the middle; then the answers are those of a run by two processes that nobody killed."""
    path = write(tmp_path, "a_csv", "prompt\n" + "".join(f"cat {k}\n" for k in range(60)))
    base = [sys.executable, SCRIPTS / "batch_score.py", "--input", path]
    base += ["--config", model[0], "--ckpt", model[1]]
    base += ["--watermark", "none", "--safety", "off", "--steps", "2", "--batch_size", "2"]

    def command(folder: str, *argv: str) -> list[str]:
        return [*map(str, base), "--outdir", str(tmp_path / folder), *argv]

    killed = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "killed", 4)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    made = len(list((tmp_path / "killed" / "samples").glob("*.png")))
    assert 4 <= made < 60
    assert not (tmp_path / "killed" / "answers").exists()
    subprocess.run(command("killed", "--resume"), check=True, capture_output=True)
    subprocess.run(command("whole", "--devices", "2"), check=True, capture_output=True)
    folders = [tmp_path / "killed", tmp_path / "whole"]
    found, wanted = (json.loads((folder / "answers/a.csv.json").read_text()) for folder in folders)
    assert found == wanted
    assert len({one["generated_image"] for one in found}) == 60
    for k in range(0, 60, 7):
        one, same = (folder / found[k]["generated_image"] for folder in folders)
        assert np.abs(pixels(one) - pixels(same)).max() <= 1


# It was accepted, and the values had no effect.
BESIDE = json.dumps({**json.loads(table(["a cat"])), "parameters": {"num_inference_steps": 99999}})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a_csv", "", "it is empty"),
        ("a_csv", "prompt\n", "there are no lines in it"),
        ("a_csv", "text\na cat\n", "the column 'text' is not known; there are prompt, negative_prompt"),
        ("a_csv", "seed\n3\n", 'no column "prompt"'),
        ("a_csv", 'prompt\n"a cat\n', "line"),
        ("a_csv", "prompt\na\0b\n", "NUL"),
        ("a_json", "{", "no JSON"),
        ("a_json", "[]", "no JSON object"),
        ("a_json", table(["a cat"], index=[0, 1]), "index has 2 entries for 1 lines"),
        ("a_json", table(["a cat"], parameters={"step": 3}), "the parameter 'step' is not known"),
        ("a_json", BESIDE, "parameters is beside input_data; it belongs inside it"),
        ("a_txt", "a cat", "holds no .csv or .json file"),
    ],
)
def test_files_that_cannot_be_used(batch: Command, name: str, content: str, words: str) -> None:
    refused(batch(**{name: content}), words)


def test_inputs_that_cannot_be_used(batch: Command, tmp_path: Path) -> None:
    path = write(tmp_path, "a_csv", "prompt\na cat\n")
    (tmp_path / "a.csv").write_text("prompt\na dog\n")
    (tmp_path / "latin.csv").write_bytes("prompt\nkäse\n".encode("latin-1"))
    refused(batch("--input", tmp_path / "b.csv"), "b.csv", "No such file")
    refused(batch("--input", tmp_path / "b.txt"), "neither .csv nor .json")
    refused(batch("--input", path, tmp_path / "a.csv"), "one file of answers")
    refused(batch("--input", tmp_path / "latin.csv"), "UTF-8")
    refused(batch("--input", path, "--sampler", "Eulr"), "--sampler Eulr is not known")
    refused(batch("--input", path, "--steps", 0), "--steps")


def test_the_script_is_executable() -> None:
    assert (SCRIPTS / "batch_score.py").stat().st_mode & stat.S_IXUSR
