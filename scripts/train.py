#!/usr/bin/env python3
"""Train a bundled model: an autoencoder, a latent diffusion model on its latents, or a depth estimator.

A run that was stopped goes on from its last checkpoint when it is started again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="train.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--base",
        required=True,
        nargs="+",
        metavar="YAML",
        help="file with a model: and a training: section, and files whose training: goes over it",
    )
    parser.add_argument(
        "--logdir", default="logs", help="everything goes to LOGDIR/<name of the last YAML> (logs)"
    )
    parser.add_argument("--output", metavar="FILE", help="averaged weights (LOGDIR/<name>/model.safetensors)")
    parser.add_argument(
        "--stop_at", type=cli.number(int, 1), metavar="STEP", help="stop here, to go on later"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)

    import torch

    from ldm.models.autoencoder import AutoencoderKL
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.modules.midas.api import MiDaSInference
    from ldm.training.config import training_config
    from ldm.training.files import writing
    from ldm.training.loop import save_weights, train
    from ldm.training.tasks import DepthTask, FirstStageTask, LatentDiffusionTask
    from ldm.util import instantiate_from_config
    from ldm.weights.loading import read_config, read_section

    bases = [Path(base) for base in args.base]
    sections = [read_section(base, "training") for base in bases]
    config = training_config({name: value for section in sections for name, value in section.items()})
    model_config = read_config(bases[0])

    folder = Path(args.logdir, bases[-1].stem)
    output = Path(args.output or folder / "model.safetensors")
    with writing(f"--logdir {args.logdir}"):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(f"--output {output}"):  # hours before there is something to write
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a folder")

    torch.manual_seed(config.seed)  # of the initial weights
    match model := instantiate_from_config(model_config):
        case LatentDiffusion():
            task = LatentDiffusionTask(model, config, folder / "latents.safetensors")
        case AutoencoderKL():
            task = FirstStageTask(model, config)
        case MiDaSInference():
            task = DepthTask(model, config)
        case _:
            raise InputError(f"{bases[0]}: the model is {type(model).__name__}, which is not trained here")
    train(task, folder, args.stop_at or config.steps)
    print(save_weights(task, output))
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
