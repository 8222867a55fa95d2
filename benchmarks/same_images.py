#!/usr/bin/env python3
"""Forty commands before and after a change: do they still write the same files and say the same things?

    python benchmarks/same_images.py record --checkout OLD --to before
    python benchmarks/same_images.py record --checkout . --to after
    python benchmarks/same_images.py compare before after

Images are compared pixel by pixel, what they record as JSON, and exit codes, messages and file names as they
are; times and what `DECLARED` names are left out.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TXT2IMG, IMG2IMG = "txt2img", "img2img"
SMALL = "--n_samples 2 --n_iter 1 --steps 6 --safety off"
INIT = "--init-img assets/init.png --n_samples 2 --n_iter 1 --steps 8 --safety off"
COMMANDS = [
    (TXT2IMG, f"{SMALL} --prompt cube"),
    (TXT2IMG, f"{SMALL} --prompt cube --plms"),
    (TXT2IMG, f"{SMALL} --prompt cube --dpm_solver"),
    (TXT2IMG, f"{SMALL} --prompt cube --ddim_eta 0.7 --seed 7"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler Euler_a --scale 2.5"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler heun --s_churn 3 --s_noise 1.01"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler dpmpp_sde --schedule karras --rho 5"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler dpmpp_3m_sde --eta 0.5"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler unipc --schedule trailing"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler dpm_fast"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler dpm_adaptive"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler lms --timesteps 999,600,300,100"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler euler --sigmas 14,5,1,0.2,0"),
    (TXT2IMG, f"{SMALL} --prompt cube --negative_prompt red --cfg_rescale 0.7"),
    (TXT2IMG, f"{SMALL} --prompt cube --guidance_start 0.2 --guidance_end 0.8"),
    (TXT2IMG, f"{SMALL} --prompt cube --variation_seed 5 --variation_strength 0.3 --ddim_eta 1"),
    (TXT2IMG, f"{SMALL} --prompt cube --fixed_code --n_iter 2"),
    (TXT2IMG, f"{SMALL} --prompt cube --fixed_code --start_seed 9 --plms"),
    (TXT2IMG, f"{SMALL} --prompt cube --rng compvis --ddim_eta 0.5 --n_iter 2"),
    (TXT2IMG, f"{SMALL} --prompt cube --rng compvis --plms --fixed_code"),
    (TXT2IMG, f"{SMALL} --from-file assets/prompts.txt --n_samples 5 --n_iter 1"),
    (TXT2IMG, f"{SMALL} --from-file assets/prompts.txt --n_samples 16 --batch_size 7 --repeat 2 --skip_grid"),
    (TXT2IMG, f"{SMALL} --prompt cube --H 72 --W 104"),
    (TXT2IMG, f"{SMALL} --prompt cube --H 256 --W 256 --n_samples 1"),
    (TXT2IMG, f"{SMALL} --prompt cube --H 256 --W 256 --n_samples 1 --watermark mine --vae_tiling"),
    (TXT2IMG, f"{SMALL} --prompt cube --format jpg --quality 80 --no_metadata"),
    (TXT2IMG, f"{SMALL} --prompt cube --format webp"),
    (TXT2IMG, f"{SMALL} --prompt cube --filename {{seed}}-{{sampler}}-{{prompt}} --no_metadata"),
    (TXT2IMG, f"{SMALL} --prompt cube --scale 1 --skip_save"),
    (TXT2IMG, f"{SMALL} --prompt cube --deepcache 2 --tome 0.3"),
    (TXT2IMG, f"{SMALL} --prompt cube --precision bf16"),
    (TXT2IMG, f"{SMALL} --prompt cube --eager --attention_slicing --quiet"),
    (TXT2IMG, f"{SMALL} --prompt cube --H 70"),
    (TXT2IMG, f"{SMALL} --prompt cube --sampler eulerr"),
    (IMG2IMG, f"{INIT} --prompt cone"),
    (IMG2IMG, f"{INIT} --prompt cone --strength 0.3 --sampler dpmpp_2m --schedule karras"),
    (IMG2IMG, f"{INIT} --prompt cone --strength 0 --scale 3"),
    (IMG2IMG, f"{INIT} --prompt cone --strength 1 --plms"),
    (IMG2IMG, f"{INIT} --prompt cone --H 96 --W 64 --resize pad --background navy --ddim_eta 0.4"),
    (IMG2IMG, f"{INIT} --prompt cone --rng compvis --n_iter 2"),
]
# What a change is meant to have changed: settings that are left out, and words that are put alike.
DECLARED = {"model_hash", "weights"}
WORDS = (("these pictures have", "these images have"), ("the pictures are", "the images are"))
NEW_NOTICES = ("--steps 6: dpm_adaptive chooses",)
TIMES = {"seconds", "run", "outdir"}


def record(checkout: Path, to: Path) -> None:
    """Run every command of a checkout, each into a folder of its own below `to`."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    for number, (script, words) in enumerate(COMMANDS):
        folder = to / f"{number:02}"
        argv = [sys.executable, f"scripts/{script}.py", *words.split(), "--json"]
        argv += ["--outdir", str(folder.absolute())]
        done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True, env=env)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(
            json.dumps({"code": done.returncode, "out": done.stdout, "err": messages(done.stderr)})
        )
        print(f"{number:02} {done.returncode} {script} {words}", flush=True)


def messages(stderr: str) -> list[str]:
    """The lines of stderr without progress bars and peaks of memory."""
    lines = [line.strip() for part in stderr.split("\r") for line in part.splitlines()]
    return [line for line in lines if line and not re.match(r"\d+ images:|peak memory", line)]


def compare(before: Path, after: Path) -> int:
    """Print what differs; the number of commands in which something does."""
    different = 0
    for number, (script, words) in enumerate(COMMANDS):
        found = differences(before / f"{number:02}", after / f"{number:02}")
        different += bool(found)
        for line in found:
            print(f"{number:02} {script} {words}: {line}")
    print(f"{len(COMMANDS) - different} of {len(COMMANDS)} commands gave the same")
    return different


def differences(before: Path, after: Path) -> list[str]:
    found = []
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (before, after))
    if one["code"] != two["code"]:
        found.append(f"exit code {one['code']}, now {two['code']}")
    said, now = (
        sorted(alike(line) for line in result["err"] if not any(new in line for new in NEW_NOTICES))
        for result in (one, two)
    )
    if said != now:
        found.append(f"messages {said}, now {now}")
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in SUFFIXES}
        for folder in (before, after)
    ]
    if names[0] != names[1]:
        return [*found, f"files {sorted(names[0])}, now {sorted(names[1])}"]
    for name in sorted(names[0]):
        found += image_differences(before / name, after / name)
    lines = [[clean(json.loads(line)) for line in result["out"].splitlines()] for result in (one, two)]
    if lines[0] != lines[1]:
        found.append(f"JSON lines {lines[0][:1]}, now {lines[1][:1]}")
    return found


SUFFIXES = (".png", ".jpg", ".webp")


def alike(line: str) -> str:
    for old, new in WORDS:
        line = line.replace(old, new)
    return line


def clean(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in DECLARED | TIMES}


def image_differences(before: Path, after: Path) -> list[str]:
    one, two = before.read_bytes(), after.read_bytes()
    if one == two:
        return []
    images = [Image.open(io.BytesIO(data)) for data in (one, two)]
    pixels = [np.asarray(image.convert("RGB")).astype(int) for image in images]
    if pixels[0].shape != pixels[1].shape or (pixels[0] != pixels[1]).any():
        most = abs(pixels[0] - pixels[1]).max() if pixels[0].shape == pixels[1].shape else "size"
        return [f"{before.name}: pixels differ by up to {most}"]
    recorded = [clean(settings_of(image)) for image in images]
    if recorded[0] != recorded[1]:
        names = {**recorded[0], **recorded[1]}
        pairs = {n: (recorded[0].get(n), recorded[1].get(n)) for n in names}
        return [f"{before.name}: settings { ({n: v for n, v in pairs.items() if v[0] != v[1]}) }"]
    return []


def settings_of(image: Image.Image) -> dict:
    text = getattr(image, "text", {}).get("stable-diffusion")
    if text is None:
        text = (image.getexif().get(0x010E) or "{}").removeprefix('{"stable-diffusion": ')
        text = text.removesuffix("}") if text != "{}" else text
    return json.loads(text)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the commands of a checkout")
    recording.add_argument("--checkout", type=Path, required=True)
    recording.add_argument("--to", type=Path, required=True)
    comparing = commands.add_parser("compare", help="compare two recordings")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.checkout, args.to)
        return 0
    return int(compare(args.before, args.after) > 0)


if __name__ == "__main__":
    sys.exit(main())
