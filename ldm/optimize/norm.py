"""GroupNorm from outside: with statistics of another image, and as one kernel with the layers around it.

`fuse_norms` changes the order of sums, so it is part of `--compile`, whose own kernels do so as well.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

Normalise = Callable[..., Tensor]


# Statistics that are given


def take_statistics(module: nn.Module) -> list[nn.GroupNorm]:
    """Let GroupNorms of `module` have `statistics`; returns those that had not been let so before.

    They are None; or [], which the next call replaces by its own, two tensors [c]; or two such tensors, by
    which x is then normalised. Plain attributes, which torch's compiler checks before each call: it does not
    look at hooks, nor for a new `forward`.
    """
    new = [n for n in module.modules() if isinstance(n, nn.GroupNorm) and "statistics" not in vars(n)]
    for norm in new:
        norm.statistics = None
        norm.forward = partial(_normalise, norm, norm.forward)
    return new


def forget_statistics(norms: list[nn.GroupNorm]) -> None:
    """Undo `take_statistics` of the norms that it returned."""
    for norm in norms:
        plain = norm.forward.args[1]
        del norm.statistics, norm.forward  # uncovers the method of the class
        if plain != norm.forward:
            norm.forward = plain


def _normalise(norm: nn.GroupNorm, plain: Normalise, x: Tensor) -> Tensor:
    if norm.statistics is None:
        return plain(x)
    if not norm.statistics:
        var, mean = torch.var_mean(x.float().reshape(norm.num_groups, -1), dim=1, correction=0)
        size = norm.num_channels // norm.num_groups
        norm.statistics = [mean.repeat_interleave(size), var.repeat_interleave(size)]
        return plain(x)
    return F.batch_norm(x, *norm.statistics, norm.weight.float(), norm.bias.float(), eps=norm.eps)


# One kernel for the norm and its neighbours


@cache
def fused_group_norm() -> Callable[..., Tensor]:
    """`norm_kernels.group_norm` as an operator that torch's compiler calls as it is; plain where it fails."""
    failed = False

    def group_norm(
        x: Tensor,
        offset: Tensor | None,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        silu: bool,
    ) -> Tensor:
        nonlocal failed
        if not failed:
            try:
                from ldm.optimize import norm_kernels

                return norm_kernels.group_norm(x, offset, groups, weight, bias, eps, silu)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton's compiler raises anything
                failed = True
                notice(f"no Triton GroupNorm, going on without: {' '.join(str(error).split()):.200}")
        return plain_group_norm(x, offset, groups, weight, bias, eps, silu)

    operator = torch.library.custom_op("stable_diffusion_toolkit::group_norm", group_norm, mutates_args=())
    operator.register_fake(lambda x, *_: torch.empty_like(x, memory_format=torch.channels_last))
    return operator


def plain_group_norm(
    x: Tensor, offset: Tensor | None, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """The same by torch's own kernels."""
    if offset is not None:
        x = x + offset[:, :, None, None]
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    y = F.silu(y) if silu else y
    return y.contiguous(memory_format=torch.channels_last)


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel runs there, with the right result."""
    try:
        from ldm.optimize import norm_kernels

        x = torch.linspace(-1, 1, 2 * 64 * 9, device=device).to(dtype).reshape(2, 64, 3, 3)
        weight, bias = x[0, :, 0, 0].contiguous() + 1, x[1, :, 0, 0].contiguous()
        arguments = (x, x[:, :, 1, 1], 32, weight, bias, 1e-5, True)
        return torch.allclose(
            norm_kernels.group_norm(*arguments).float(),
            plain_group_norm(*(a.float() if isinstance(a, Tensor) else a for a in arguments)),
            rtol=2e-2,
            atol=2e-2,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no Triton, no compiler for its launcher, a device that it does not know
        return False


def fuse_norms(model: LatentDiffusion, report: Callable[[str], None] = notice) -> bool:
    """Normalise in `model`'s UNet and decoder by one Triton kernel, with channels last in memory.

    It also adds what precedes a norm, the bias of a convolution and a residual block's time offset, and
    applies the SiLU after it. The result equals the plain one to rounding. Returns whether it was done: where
    the kernel does not run `report` gets one message. Weights of 16 bits gain; those of 32 may be given.
    """
    unet, first_stage = model.model.diffusion_model, model.first_stage_model
    weight = next(unet.parameters())
    if not can_fuse(weight.device, weight.dtype):
        report("no Triton GroupNorm here, going on without")
        return False
    parts = [unet] if isinstance(unet, UNetModel) else []
    if isinstance(first_stage, AutoencoderKL):
        parts.append(first_stage.decoder)
        take_statistics(first_stage.decoder)
    for part in parts:
        part.to(memory_format=torch.channels_last)
        for module in part.modules():
            match module:
                case ResBlock():
                    module.forward = _res_block(module)
                case ResnetBlock():
                    module.forward = _resnet_block(module)
                case SpatialTransformer() | AttnBlock():
                    module.norm.forward = _fused(module.norm)
                case UNetModel():
                    module.out[0].forward = _fused(module.out[0], silu=True)
                    module.out[1].forward = _unchanged  # the SiLU, which is in the norm
                case Decoder():
                    module.norm_out.forward = _fused(module.norm_out)
    return True


def _unchanged(x: Tensor) -> Tensor:
    return x


def _fused(norm: nn.GroupNorm, silu: bool = False) -> Normalise:
    """The norm of x + offset [b or 1, c], with SiLU if asked for."""
    operator, plain = fused_group_norm(), norm.forward

    def forward(x: Tensor, offset: Tensor | None = None) -> Tensor:
        if getattr(norm, "statistics", None) is None:
            return operator(x, offset, norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
        y = plain(x if offset is None else x + offset[:, :, None, None])
        return F.silu(y) if silu else y

    return forward


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv._conv_forward(x, conv.weight, None)  # which seamless images replace


def _res_block(block: ResBlock) -> Callable[[Tensor, Tensor], Tensor]:
    first, _, conv = block.in_layers
    second, *_, last = block.out_layers
    norm_in, norm_out = _fused(first, silu=True), _fused(second, silu=True)

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        h = _without_bias(conv, norm_in(x))
        h = last(norm_out(h, block.emb_layers(emb) + conv.bias))
        return h + block.skip_connection(x)

    return forward


def _resnet_block(block: ResnetBlock) -> Callable[[Tensor], Tensor]:
    norm1, norm2 = _fused(block.norm1, silu=True), _fused(block.norm2, silu=True)

    def forward(x: Tensor) -> Tensor:
        h = _without_bias(block.conv1, norm1(x))
        h = block.conv2(norm2(h, block.conv1.bias[None]))
        return h + block.nin_shortcut(x)

    return forward
