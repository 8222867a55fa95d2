#!/usr/bin/env python3
"""The training images nearest to samples: has a model memorised some of what it was trained on?"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError

FEATURES = ("detector", "clip", "pixels")
SHOWN = 12  # samples in the sheet
FALSE_POSITIVES, CALIBRATE_ON = 0.01, 1000  # of a calibration


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="nearest.py", description=__doc__)
    add = parser.add_argument
    count, share = cli.number(int, 1), cli.number(float, 0, 0.5)
    source = "an image folder, .tar shards, .parquet, or a training YAML"
    add("images", nargs="+", metavar="IMAGE", help="samples: files, or folders of them")
    add("--training", required=True, metavar="SET", help=f"the training set: {source}")
    add("--features", choices=FEATURES, default="pixels", help="what is compared (pixels)")
    add("--clip", metavar="DIR", help="for clip: folder of a CLIP model in transformers' layout")
    add("--count", type=count, default=5, metavar="N", help="nearest images of each sample (5)")
    add("--index", metavar="FILE", help="features of the training set, made once (in the cache folder)")
    add("--threshold", type=cli.number(float, -1, 1), help="similarity of a copy (calibrated)")
    add("--held_out", metavar="SET", help=f"calibrate on these, which are no copies: {source}")
    text = "calibrate so that this share of them would count as copies (0.01)"
    add("--false_positives", type=share, metavar="SHARE", help=text)
    add("--calibrate_on", type=count, metavar="N", help="as many of them (1000)")
    text = "hide copies of N training images among the samples, exact and altered: are they found? (0)"
    add("--planted", type=cli.number(int, 0), default=0, metavar="N", help=text)
    add("--seed", type=cli.number(int, 0, 2**63 - 1), default=42, help="picks planted and other images (42)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--detector", default="models/scenes-64/detector.safetensors", metavar="FILE", help="its weights")
    add("--outdir", default="outputs/nearest", help="folder for nearest.csv, nearest.json and the sheet")
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if (args.features == "clip") != (args.clip is not None):
        parser.error("--clip DIR and --features clip go together: features clip are a CLIP model's in DIR")
    calibrating = ("held_out", "false_positives", "calibrate_on")
    given = [f"--{name}" for name in calibrating if getattr(args, name) is not None]
    if args.threshold is not None and given:
        parser.error(
            f"--threshold {args.threshold:g} leaves nothing to calibrate: leave out {', '.join(given)}"
        )
    args.false_positives = FALSE_POSITIVES if args.false_positives is None else args.false_positives
    args.calibrate_on = args.calibrate_on or CALIBRATE_ON
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)

    from ldm.cli.sources import image_files

    files, notices = image_files(args.images, 64_000_000)
    if missing := [file for file in files if not Path(file).is_file()]:
        raise InputError(f"IMAGE {missing[0]}: there is no such file")

    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from ldm.cache import cache_folder
    from ldm.evaluation import nearest
    from ldm.evaluation.scenes import writing
    from ldm.images.init_image import open_init_image
    from ldm.log import notice
    from ldm.pipeline.device import choose_device
    from ldm.training.data.given import given_source
    from ldm.weights.loading import find

    for line in notices:
        notice(line)
    outdir = Path(args.outdir)
    with writing(outdir):
        outdir.mkdir(parents=True, exist_ok=True)
    device = choose_device(args.device)
    match args.features:
        case "detector":
            features = nearest.Scenes(Path(find(args.detector)), device)
        case "clip":
            features = nearest.Clip(args.clip, device)
        case _:
            features = nearest.Pixels()
    source = given_source("--training", args.training)
    held_out = given_source("--held_out", args.held_out) if args.held_out else None

    kept = f"{source.fingerprint[:24]}-{features.name}.safetensors"
    try:
        path = Path(args.index) if args.index else cache_folder() / "nearest" / kept
    except RuntimeError as error:
        why = f"there is no folder for the index, because {error}"
        raise InputError(f"{why}: name a file with --index, or set XDG_CACHE_HOME") from error
    index = nearest.open_index(path, source, features, given=args.index is not None)

    def read(number: int) -> np.ndarray:
        return np.asarray(open_init_image(files[number]))

    samples = nearest.vectors(map(read, tqdm(range(len(files)), "reading samples", leave=False)), features)
    calibration = None
    if args.threshold is None:
        calibration = nearest.calibrate(
            index, features, held_out, args.false_positives, args.calibrate_on, args.seed
        )
        print(calibration)
    threshold = args.threshold if calibration is None else calibration.threshold
    similarity, rows = nearest.nearest(index, samples, args.count)
    report = nearest.Report(files, similarity, rows, source, threshold)
    print(f"{report.flagged.sum()} of {len(files)} samples are as near to a training image as a copy")
    record = {
        "settings": vars(args),
        "index": index.facts,
        "calibration": calibration and vars(calibration),
        "threshold": threshold,
        "samples": len(files),
        "flagged": [files[i] for i in np.flatnonzero(report.flagged)],
    }
    if args.planted:
        planted = nearest.plant(source, index, args.planted, args.seed)
        copies = nearest.vectors((each.image for each in planted), features)
        near, of = nearest.nearest(index, copies, 1)
        found = nearest.found_again(planted, of[:, 0], near[:, 0], threshold, int(report.flagged.sum()))
        record["planted"] = found | {"images": len(planted)}
        for name, recall in found["recall"].items():
            print(f"planted, {name}: {100 * recall:.1f} % found")
        print(
            f"planted copies: recall {100 * found['recall of all']:.1f} %, precision "
            f"{100 * found['precision']:.1f} % among {len(files)} samples"
        )
    lines = list(report.lines())
    with writing(outdir):
        with (outdir / "nearest.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)
        record["nearest"] = lines
        (outdir / "nearest.json").write_text(json.dumps(record, indent=1) + "\n")
        Image.fromarray(report.sheet(read, SHOWN)).save(outdir / "nearest.png")
    print(outdir)
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
