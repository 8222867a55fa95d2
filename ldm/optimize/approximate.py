"""`--deepcache N` and `--tome RATIO`: an image near the exact one in less time. Off by default."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import Block, Downsample, UNetModel, Upsample
from ldm.optimize import graph
from ldm.optimize.calls import Call, CallState
from ldm.sampling.denoiser import timestep_of

# Deep features that are kept: more than there can be recordings, which read them. The margin is for calls
# that are not recorded.
MOST = graph.MOST + 4


class Features:
    """What calls of one shape keep of the deep blocks. `last` stays where it is: recorded graphs read it."""

    def __init__(self) -> None:
        self.sizes: dict[Block, torch.Size] = {}  # of every deep block's output, [h, w]
        self.last: Tensor | None = None  # the output of the last of them


class DeepFeatures(CallState):
    """A UNet's deep features, computed at one call in `every` and used again at those between.

    Only the first input block and the last output block see each call's latents, which is the branch that the
    paper found fastest (Ma et al. 2023, https://arxiv.org/abs/2312.00858, 3.2). Nothing is carried over from
    one run to the next: features are computed anew where the timestep rises or is again the run's first, and
    where the shape, the context or the class labels change. Context and labels are compared as objects, of
    which each run needs its own, even for the same prompt: only they show that a run that starts where the
    one before ended is another one.
    """

    def __init__(self, unet: UNetModel, every: int):
        super().__init__(unet)
        self.every = every
        self.plain_run, unet.run = unet.run, self.run
        self.shallow = {unet.input_blocks[0], unet.output_blocks[-1]}
        self.last_deep = ([unet.middle_block, *unet.output_blocks])[-2]
        self.kept: OrderedDict[tuple, Features] = OrderedDict()
        self.current = Features()
        self.shape: torch.Size | None = None
        self.context: Tensor | None = None
        self.labels: Tensor | None = None
        self.first = self.last = -1.0  # timesteps
        self.age = 0

    def begin(self, call: Call) -> tuple[bool, Features]:
        """Whether this call computes the deep features, and where they are kept, which a recording reads."""
        t = timestep_of(call.timesteps)
        same_inputs = call.shape == self.shape and call.context is self.context and call.y is self.labels
        if t > self.last or t >= self.first or not same_inputs:
            self.first, self.age = t, 0
        else:
            self.age = (self.age + 1) % self.every
        self.last, self.shape, self.context, self.labels = t, call.shape, call.context, call.y
        device = call.timesteps.device
        key = (call.shape, call.dtype, device, graph.autocast_state(device.type))
        self.current = self.kept.setdefault(key, Features())
        self.kept.move_to_end(key)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return self.age == 0, self.current

    def run(self, block: Block, x: Tensor, *inputs: Any) -> Tensor:
        if block in self.shallow:
            return self.plain_run(block, x, *inputs)
        features = self.current
        if self.age == 0:
            out = self.plain_run(block, x, *inputs)
            features.sizes[block] = out.shape[2:]
            if block is self.last_deep:
                with torch.inference_mode(False), torch.no_grad():  # it outlives the caller's mode
                    if features.last is None:
                        features.last = torch.empty_like(out)
                    features.last.copy_(out)
            return out
        if block is self.last_deep:
            return features.last
        return x.new_empty(0, 1, *features.sizes[block])  # no deep block reads it, only its size


def reuse_deep_features(model: LatentDiffusion, every: int) -> None:
    """Compute the deep features of `model`'s UNet only at each `every`-th call of a run.

    1 gives the plain result; less is an InputError. A call of the v1 UNet in between takes 9 % of a whole
    one. Images of `scenes-64`, 50 steps of ddim, are 34 to 56 dB from the exact ones at 2, 23 to 52 at
    3, 21 to 44 at 5 (`benchmarks/benchmark.py --only approximations`).
    The host decides by the timestep, and `graph_unet` records a whole call and one in between. Samplers that
    call the model several times a step reuse across those calls too.
    """
    if every < 1:
        raise InputError(f"deep features for {every} calls; at least 1")
    DeepFeatures(model.model.diffusion_model, every)


def merge_tokens(x: Tensor, height: int, width: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Tokens x [b, h w, c] with the share `ratio` averaged into others, and where to find each token again.

    The top left token of every 2x2 square stays; of the others those most like one that stays go into it
    (Bolya & Hoffman 2023, https://arxiv.org/abs/2303.17604, 3; Bolya et al. 2022,
    https://arxiv.org/abs/2210.09461, 3). Returns fewer tokens [b, m, c] and the index among them that stands
    for each of x, int64 [b, h w].
    """
    batch, n, channels = x.shape
    grid = torch.arange(n, device=x.device).view(height, width)
    into = grid[::2, ::2].flatten()
    sources = torch.cat([grid[::2, 1::2].flatten(), grid[1::2].flatten()])
    count = min(int(ratio * n), len(sources))

    unit = F.normalize(x, dim=-1)
    similarity, nearest = (unit[:, sources] @ unit[:, into].transpose(1, 2)).max(dim=-1)  # [b, sources]
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :count], order[:, count:]
    target = nearest.gather(1, merged)

    def take(tokens: Tensor, index: Tensor) -> Tensor:
        return tokens.gather(1, index[..., None].expand(-1, -1, channels))

    # As a product: a GPU adds scattered tokens in another order each time, and images would differ.
    onto = target[:, None] == torch.arange(len(into), device=x.device)[:, None]  # [b, into, merged]
    sums = x[:, into] + onto.to(x.dtype) @ take(x[:, sources], merged)
    averages = sums / (1 + onto.sum(dim=-1, keepdim=True)).to(x.dtype)
    places = torch.arange(len(into) + len(sources) - count, device=x.device).expand(batch, -1)
    source_places = torch.empty_like(order).scatter_(1, merged, target)
    source_places.scatter_(1, kept, places[:, len(into) :])
    found = torch.empty(batch, n, dtype=order.dtype, device=x.device)
    found[:, into], found[:, sources] = places[:, : len(into)], source_places
    return torch.cat([averages, take(x[:, sources], kept)], dim=1), found


class Merging:
    """Self-attention over merged tokens, in the transformers of one feature map."""

    def __init__(self, transformer: SpatialTransformer, ratio: float):
        self.ratio = ratio
        self.size = (0, 0)  # of the feature map under way
        transformer.register_forward_pre_hook(self.remember_size)
        self.attentions = [
            block.attn1 for block in transformer.transformer_blocks if not block.disable_self_attn
        ]
        for attention in self.attentions:
            attention.forward = partial(self.attention, attention.forward)

    def remember_size(self, transformer: SpatialTransformer, inputs: tuple[Tensor, ...]) -> None:
        self.size = inputs[0].shape[2:]

    def attention(self, plain: Callable[..., Tensor], x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens, found = merge_tokens(x, *self.size, self.ratio)
        out = plain(tokens, context)
        return out.gather(1, found[..., None].expand(-1, -1, out.shape[2]))


def widest_transformers(unet: UNetModel) -> list[SpatialTransformer]:
    """The transformers that work at the resolution of the latents: before any halving, after all doubling."""
    found = []
    for blocks, change in ((unet.input_blocks, Downsample), (reversed(unet.output_blocks), Upsample)):
        for block in blocks:
            if any(isinstance(layer, change) for layer in block):
                break
            found += [layer for layer in block if isinstance(layer, SpatialTransformer)]
    return found


def merge_similar_tokens(model: LatentDiffusion, ratio: float) -> int:
    """Let self-attention at the latents' resolution work on 1 - `ratio` of its tokens, `ratio` in 0 … 0.75.

    0 gives the plain result; at 0.75 only one token of four is left; a ratio out of range is an InputError.
    At 0.5 a step of the v1 UNet at 64x64 latents takes 0.86 of its time in float32 and 0.83 in bfloat16 on
    a processor with AVX-512 (docs/speed.md), and images of `scenes-64` are 25 to 43 dB from the exact ones.
    Returns the number of these self-attentions, which is 0 for the UNet of the x4 upscaler.
    """
    if not 0 <= ratio <= 0.75:
        raise InputError(f"a share of {ratio:g} merged tokens; it must be in 0 … 0.75")
    if ratio == 0:
        return 0
    merged = [Merging(transformer, ratio) for transformer in widest_transformers(model.model.diffusion_model)]
    return sum(len(each.attentions) for each in merged)
