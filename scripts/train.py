#!/usr/bin/env python3
"""Train either stage of the bundled model: an autoencoder, or a latent diffusion model on its latents."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="YAML file with a model: and a training: section")
    parser.add_argument("--logdir", default="logs", help="checkpoints, losses and samples go to LOGDIR/<name of the YAML>")
    parser.add_argument("--output", help="where the averaged weights go (default: LOGDIR/<name>/model.safetensors)")
    parser.add_argument("--steps", type=int, help="train this many steps instead of the YAML's")
    args = parser.parse_args(argv)

    import dataclasses

    import torch
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.training import FirstStageTask, LatentDiffusionTask, TrainingConfig, half, train
    from ldm.util import instantiate_from_config

    config = OmegaConf.to_container(OmegaConf.load(args.base), resolve=True)
    training = TrainingConfig(**config["training"])
    if args.steps is not None:
        training = dataclasses.replace(training, steps=args.steps)
    folder = Path(args.logdir, Path(args.base).stem)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)  # the initial weights
    model = instantiate_from_config(config["model"])
    if isinstance(model, LatentDiffusion):
        task = LatentDiffusionTask(model, training, folder / "latents.safetensors")
    else:
        task = FirstStageTask(model, training)
    train(task, folder)
    output = Path(args.output or folder / "model.safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    state = task.averaged_state()
    save_file(dict(half(state)) if isinstance(model, LatentDiffusion) else state, output)
    print(output)


if __name__ == "__main__":
    main()
