#!/usr/bin/env python3
"""Text to image: the original's command, on linked Stable Diffusion weights or on the bundled model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli


def main(argv: list[str] | None = None) -> int:
    args = cli.txt2img_parser().parse_args(argv)
    cli.check_arguments(args)

    from ldm.loading import advised_scale, choose_model, native_size, read_config
    from ldm.prompts import plan, read_prompts

    prompts = read_prompts(args.from_file) if args.from_file else [args.prompt] * args.n_samples
    files = choose_model(args.config, args.ckpt)
    if files.notice:
        cli.notice(files.notice)
    config = read_config(files.config)
    size = native_size(config)
    height, width = args.H or size, args.W or size
    scale = advised_scale(files.config, cli.SCALE) if args.scale is None else args.scale
    writer = cli.picture_writer(args, height, width)  # tries the output folder before anything slow

    from ldm.generate import Settings, generate
    from ldm.sampling.noise import image_seed

    model = cli.load(args, files, config)
    cli.check_prompts(model, [*prompts, args.negative_prompt])
    settings = Settings(
        height=height,
        width=width,
        sampler=args.sampler,
        steps=args.ddim_steps,
        scale=scale,
        eta=args.ddim_eta if args.sampler == "ddim" else 0.0,
        negative_prompt=args.negative_prompt,
        seed=cli.choose_seed(args.seed),
        rng=args.rng,
        fixed_code=args.fixed_code,
        autocast=args.precision == "autocast",
    )
    facts = vars(settings) | {"n_samples": args.n_samples} | cli.model_facts(args, files)
    batches = plan(prompts, args.n_iter, args.n_samples)
    skipped = 0
    with cli.StepBar(sum(map(len, batches)), settings.steps) as bar:
        for batch, images in generate(model, batches, settings, bar.step):
            for k, (prompt, image) in enumerate(zip(batch.prompts, images, strict=True), batch.first):
                if image is None:
                    bar.notice(f"image {k} ({prompt!r}) came out as NaN and is skipped")
                    skipped += 1
                    continue
                own = {"prompt": prompt, "image": k}
                if settings.rng == "image":  # the original's one stream has no seed for image k alone
                    own["seed"] = image_seed(settings.seed, k)
                writer.add(image, None if args.no_metadata else facts | own)
    prompt = "\n".join(dict.fromkeys(prompts))
    writer.finish(args.n_rows or args.n_samples, None if args.no_metadata else facts | {"prompt": prompt})
    print(args.outdir)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
