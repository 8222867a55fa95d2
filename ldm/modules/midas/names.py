"""The names of the depth estimator's weights, transformers' and the checkpoint's; without torch."""

import re

BACKBONE = r"^dpt\.embeddings\.backbone\.bit\."
REASSEMBLE = r"^neck\.reassemble_stage\."


def from_one(pattern: re.Match) -> int:
    """MiDaS counts its stages from 1."""
    return int(pattern[1]) + 1


# transformers' names -> the checkpoint's, applied one after the other
NAMES = (
    (rf"{BACKBONE}embedder\.convolution", "pretrained.model.patch_embed.backbone.stem.conv"),
    (rf"{BACKBONE}embedder\.norm", "pretrained.model.patch_embed.backbone.stem.norm"),
    (
        rf"{BACKBONE}encoder\.stages\.(\d+)\.layers",
        r"pretrained.model.patch_embed.backbone.stages.\1.blocks",
    ),
    (r"^dpt\.embeddings\.projection", "pretrained.model.patch_embed.proj"),
    (r"^dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"^dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"^dpt\.encoder\.layer\.", "pretrained.model.blocks."),
    (r"attention\.attention\.(query|key|value)", "attn.qkv"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^dpt\.layernorm", "pretrained.model.norm"),
    (
        rf"{REASSEMBLE}readout_projects\.(\d)\.0",
        lambda m: f"pretrained.act_postprocess{from_one(m)}.0.project.0",
    ),
    (rf"{REASSEMBLE}layers\.(\d)\.projection", lambda m: f"pretrained.act_postprocess{from_one(m)}.3"),
    (rf"{REASSEMBLE}layers\.(\d)\.resize", lambda m: f"pretrained.act_postprocess{from_one(m)}.4"),
    (r"^neck\.convs\.(\d)", lambda m: f"scratch.layer{from_one(m)}_rn"),
    (r"^neck\.fusion_stage\.layers\.(\d)", lambda m: f"scratch.refinenet{4 - int(m[1])}"),
    (r"(refinenet\d)\.projection", r"\1.out_conv"),
    (r"residual_layer(\d)\.convolution", r"resConfUnit\1.conv"),
    (r"^head\.head", "scratch.output_conv"),
)


def checkpoint_name(name: str) -> str:
    """The checkpoint's name for a weight of transformers' network; query, key and value have one together."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name
