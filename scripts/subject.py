#!/usr/bin/env python3
"""Images of a subject that no bundled model has ever seen, to fine-tune on, and a measure of the result."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="subject.py", description=__doc__)

    def add(flag: str, help: str, **facts: object) -> None:
        parser.add_argument(flag, help=help, **facts)

    add("--outdir", "write images of it to this folder", metavar="FOLDER")
    add("--count", "how many (10)", type=cli.number(int, 1), default=10, metavar="N")
    add(
        "--seed",
        "of places and shades, or of the scenes of --measure (0)",
        type=cli.number(int, 0),
        default=0,
        metavar="N",
    )
    add("--alone", "the subject of textual inversion, a cylinder without other solids", action="store_true")
    add("--captions", "write a caption beside each image, too", action="store_true")
    add("--measure", "draw new scenes, and print how often they are right", metavar="PNG")
    add("--ckpt", "for --measure: the model (scenes-64)", metavar="FILE")
    add("--lora", "for --measure", default=[], action="append", metavar="FILE")
    add("--embedding", "for --measure", default=[], action="append", metavar="FILE")
    add("--word", "for --measure: the subject in prompts (zqx)", default="zqx")
    add("--images", "for --measure: images of the subject, and as many of others of its class (64)",
        type=cli.number(int, 1), default=64, metavar="N")  # fmt: skip
    add("--debug", "show where an error comes from", action="store_true")
    args = parser.parse_args(argv)
    if not (args.outdir or args.measure):
        raise InputError("nothing to do: give --outdir or --measure")
    if args.measure and args.alone and args.images < 2:
        raise InputError(
            f"--images {args.images}: --alone takes 2 at least, as half of them are before unseen backgrounds"
        )

    import numpy as np
    from PIL import Image

    from ldm.evaluation.intervals import share
    from ldm.log import problem
    from ldm.pipeline.options import RuntimeOptions
    from ldm.pipeline.pipeline import Pipeline
    from ldm.scenes.scores import marked_grid
    from ldm.scenes.subject import measure, measure_alone, measure_class, write_images
    from ldm.training.data.sources import examples_named
    from ldm.training.files import whole, writing
    from ldm.weights.loading import SMALL_CONFIG, SMALL_WEIGHTS, bundled_family, find
    from ldm.weights.prediction import file_hints

    if args.outdir:
        with writing(f"--outdir {args.outdir}"):
            write_images(Path(args.outdir), args.count, args.seed, args.captions, args.alone)
    lost: list[str] = []
    if args.measure:
        # A model that states its size is recognised; others are taken for kin of the small one.
        ckpt = args.ckpt or str(find(SMALL_WEIGHTS))
        states_size = args.ckpt and (bundled_family(Path(ckpt)) or file_hints(ckpt).size)
        config = None if states_size else str(find(SMALL_CONFIG))
        pipeline = Pipeline.load(ckpt, config, RuntimeOptions(batch_size=16), safety="off")
        fields = {"lora": tuple(args.lora), "embedding": tuple(args.embedding)}
        if args.alone:
            subject = measure_alone(pipeline, args.word, args.images, args.seed, **fields)
            images, shows, lost = subject.images, subject.shows, subject.lost
            right = np.concatenate(list(shows.values()))
        else:
            subject = measure(pipeline, args.word, args.images, args.seed, **fields)
            others = measure_class(pipeline, args.images, args.seed, **fields)
            images, shows = [*subject.images, *others.images], {**subject.shows, **others.shows}
            right = np.concatenate([shows["both"], shows["others of the class"]])
            lost = [*subject.lost, *others.lost]
        with whole(Path(args.measure)) as unfinished:
            Image.fromarray(marked_grid(images, right, columns=16)).save(unfinished, "png")
        for name, passed in shows.items():
            found = share(passed)
            print(f"{name}: {found.value:.0%} ({found.low:.0%} to {found.high:.0%}) of {len(passed)}")
        if lost:
            which = examples_named([repr(prompt) for prompt in lost])
            problem(f"{len(lost)} of {len(images)} images came out as NaN, and count as wrong: {which}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
