"""`--compile`: torch's compiler over the UNet and the decoder, which fuses norms, activations and sums.

Compiled code is kept on disk, so that a second run of the same model, shapes and torch starts sooner
(https://docs.pytorch.org/docs/stable/torch.compiler.html).
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from ldm.cache import cache_folder
from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion


def compiled(plain: Callable, name: str, report: Callable[[str], None] = notice) -> Callable:
    """`plain`, compiled when it is first called. Where that fails, `plain` itself is called from then on.

    `report` is given one message about the failure, in which the function is called `name`.
    """
    from torch._dynamo.exc import TorchDynamoException

    fast = torch.compile(plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args, **kwargs)
            except TorchDynamoException as error:
                fast = None
                report(f"--compile: the {name} goes on without: {' '.join(str(error).split()):.200}")
        return plain(*args, **kwargs)

    return forward


def compile_model(model: LatentDiffusion, report: Callable[[str], None] = notice) -> None:
    """Compile `model`'s UNet and decoder, with channels last in memory.

    The result equals the plain one to rounding. The first call of each shape takes as long as compiling does,
    a minute or more where the disk has nothing of it. Apply this before `graph_unet`, which then records the
    compiled functions.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    parts = {"UNet": model.model.diffusion_model}
    if isinstance(model.first_stage_model, AutoencoderKL):
        parts["decoder"] = model.first_stage_model.decoder
    for name, module in parts.items():
        module.to(memory_format=torch.channels_last)
        module.forward = compiled(module.forward, name, report)
