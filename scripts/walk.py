#!/usr/bin/env python3
"""A walk between prompts and seeds: frames, and a video where ffmpeg is there.

walk.py --prompts "a red cube" "a blue sphere" --seeds 1 2 --frames 30 takes every other option of txt2img.py.
Noise goes along the great circle between the seeds' noises, the prompts' embeddings are mixed. Each frame is
an image that its settings make again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ldm.cli import arguments, entry, parser
from ldm.errors import InputError
from ldm.log import notice, problem
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.text import A1111
from ldm.weights.description import describe

NOT_FOR_FRAMES = (
    *("prompt", "from_file", "repeat", "expand", "wildcards", "n_iter", "prompt_to", "prompt_mix"),
    *("seed", "fixed_code", "start_seed", "variation_seed", "variation_strength"),
)
VIDEO = "walk.mp4"


def parse(argv: list[str]) -> tuple[arguments.Arguments, list[ImageRequest], int]:
    """The arguments, the request of each frame, and the frames of a second. InputError."""
    options = parser.walk_parser()
    given = vars(options.parse_args(argv))
    for name in NOT_FOR_FRAMES:
        if name in given:
            raise InputError(f"{parser.flag_of(name)} is not for walk.py: the walk decides it for each frame")
    if not all(map(str.strip, given["prompts"])):
        raise InputError("--prompts: one of them is empty, and the walk has no way there; give it a word")
    given["prompt"] = given["prompts"][0]
    command = arguments.gather(options, given)
    # the run's seed is that of the image of --like, or the default one
    places = _places(given["prompts"], given.get("seeds") or [command.run.seed])
    if given.get("loop"):
        places.append(places[0])
    if len(places) < 2:
        raise InputError("--prompts and --seeds name one place: give at least two prompts or two seeds")
    if given["frames"] < len(places):
        raise InputError(f"--frames {given['frames']}: give at least one for each of {len(places)} places")
    # what the image of --like, itself a frame perhaps, has of them is not for these frames, either
    values = {name: value for name, value in command.values.items() if name not in NOT_FOR_FRAMES}
    command = replace(command, values=values)
    _check_prompts(given["prompts"], command.values.get("prompt_syntax"))
    arguments.warn_of_ignored_eta(command.values)
    if command.values.get("rng") == "compvis":
        raise InputError("--rng compvis is not for walk.py: in the original's one stream no frame has a seed")
    requests = [command.variant(one) for one in _frames(places, given["frames"], bool(given.get("loop")))]
    requests[0].check_size(describe(command.config).factor or 8)
    return command, requests, given["fps"]


def _check_prompts(prompts: Sequence[str], syntax: str | None) -> None:
    """InputError for what the frames between different prompts cannot have."""
    if syntax != A1111 or len(set(prompts)) == 1:
        return
    from ldm.prompts.lora_tags import split_lora_tags
    from ldm.prompts.syntax import PromptError, changes, check, composed

    for prompt in prompts:
        text, tags = split_lora_tags(prompt)
        if tags:
            raise InputError(
                f"--prompts: {prompt!r} has a tag of the LoRA {tags[0][0]!r}, and a LoRA cannot come and go "
                "between frames; give it as --lora, for all of them"
            )
        try:
            check(text, prompt=prompt)
        except PromptError as error:
            raise InputError(f"--prompts: {error}") from None
        parts = composed(text)
        if len(parts) > 1 or changes(parts[0][0]):
            raise InputError(f"--prompts: {prompt!r} has AND or a schedule: embeddings are mixed once")


def _places(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """What the walk comes by; a single prompt or seed is that of all."""
    count = max(len(prompts), len(seeds))
    for flag, found in (("--prompts", prompts), ("--seeds", seeds)):
        if len(found) not in (1, count):
            raise InputError(f"{flag}: {len(found)} for {count} places; give one, or one for each")
    return [(prompts[i % len(prompts)], seeds[i % len(seeds)]) for i in range(count)]


def _frames(places: Sequence[tuple[str, int]], frames: int, loop: bool) -> list[dict[str, Any]]:
    """The settings of each frame; a loop does not come to its first frame again."""
    ways, found = len(places) - 1, []
    for i in range(frames):
        way, step = divmod(i * ways, frames if loop else frames - 1)
        share = step / (frames if loop else frames - 1)
        (prompt, seed), (next_prompt, next_seed) = places[way], places[min(way + 1, ways)]
        own: dict[str, Any] = {"prompt": prompt, "seed": seed}
        if share and next_prompt != prompt:
            own |= {"prompt_to": next_prompt, "prompt_mix": share}
        if share and next_seed != seed:
            own |= {"variation_seed": next_seed, "variation_strength": share}
        found.append(own)
    return found


def main(argv: list[str] | None = None) -> int:
    command, requests, fps = parse(sys.argv[1:] if argv is None else argv)
    command.check_files()

    from ldm.runs.processes import find_place
    from ldm.runs.run import run

    code = run(command.pipeline(), requests, command.run)
    if code or command.run.dry_run or command.run.plan:
        return code
    leads = find_place(command.run.devices, command.run.num_nodes).rank == 0
    return film(Path(command.run.outdir), fps, command.run.skip_save) if leads else 0


def film(outdir: Path, fps: int, unsaved: bool) -> int:
    """Write the frames of the folder's last run as a video, if ffmpeg is there. Returns the exit code.

    It replaces no video but that of the same run, which was taken up again. A video that lacks a frame would
    pass for whole, so that there is none if a frame cannot be read any more.
    """
    from ldm.images.outputs import rename_to_new
    from ldm.runs.manifest import RUNS, append

    ffmpeg = shutil.which("ffmpeg")
    if unsaved:
        return 0
    if ffmpeg is None:
        notice(f"there is no ffmpeg: the frames are in {outdir / 'samples'}, and there is no {VIDEO}")
        return 0
    run, files, video = _last_run(outdir)
    temporary = outdir / f".{VIDEO}.tmp.mp4"
    try:
        if reason := _encode(ffmpeg, files, fps, temporary):
            problem(f"ffmpeg made no {VIDEO}: {reason}")
            return 1
        if video is not None:
            temporary.replace(outdir / video)
            return 0
        path = rename_to_new(temporary, outdir / VIDEO)
    except InputError as error:
        problem(f"no {VIDEO}: {error}; if it is gone, the same command with --resume makes both")
        return 1
    finally:
        temporary.unlink(missing_ok=True)
    append(outdir / RUNS, {"run": run, "video": path.name})
    if path.name != VIDEO:
        notice(f"{outdir / VIDEO} was there before: this walk's video is {path.name}")
    return 0


def _encode(ffmpeg: str, files: Sequence[Path], fps: int, target: Path) -> str:
    """Write a video of the frames. Returns why ffmpeg made none, or "".

    InputError for a frame that cannot be read.
    """
    import numpy as np

    from ldm.images.metadata import open_image

    with open_image(files[0]) as first:
        width, height = first.size
    words = [ffmpeg, "-y", "-loglevel", "error"]
    words += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    words += ["-pix_fmt", "yuv420p", str(target)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            for file in files:
                with open_image(file) as image:
                    process.stdin.write(np.asarray(image.convert("RGB")).tobytes())
        except BrokenPipeError:
            pass  # it has ended, and says why
        _, errors = process.communicate()
    if not process.returncode:
        return ""
    reason = errors.decode(errors="replace").strip().splitlines()
    return reason[-1] if reason else f"exit code {process.returncode}"


def _last_run(outdir: Path) -> tuple[str, list[Path], str | None]:
    """The id of the folder's last run, its files in order, and the name of its video, None if it has none."""
    from ldm.runs.manifest import RUNS, read_lines, read_manifest

    lines = [line for line in read_lines(outdir / RUNS) if "run" in line]
    run = lines[-1]["run"]
    video = next((line["video"] for line in lines if line["run"] == run and "video" in line), None)
    files = {line["image"]: line["file"] for line in read_manifest(outdir, run) if line["file"]}
    return run, [outdir / files[k] for k in sorted(files)], video


if __name__ == "__main__":
    sys.exit(entry.run(main))
