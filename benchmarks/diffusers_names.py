"""diffusers' UNet with our weights: its configuration for Stable Diffusion v1, and its names for ours."""

V1_UNET = {  # stable-diffusion-v1-5/unet/config.json, where it differs from UNet2DConditionModel's defaults
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers' old mistake: it is the number of heads
    "block_out_channels": (320, 640, 1280, 1280),
    "sample_size": 64,
}

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def diffusers_name(name: str) -> str:
    """`input_blocks.1.0.in_layers.0.bias` -> `down_blocks.0.resnets.0.norm1.bias`, for two blocks a level."""
    module, leaf = name.rsplit(".", 1)
    if module in ENDS:
        return f"{ENDS[module]}.{leaf}"
    side, *path = module.split(".")
    if side == "middle_block":
        block, index = "mid_block", int(path.pop(0)) // 2  # resnet, attention, resnet
    else:
        # a level is two blocks and a downsampler on the way down, three blocks on the way up
        level, index = divmod(int(path.pop(0)) - (side == "input_blocks"), 3)
        block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
        path.pop(0)  # the layer's place within our block
    match path:
        case ["op"]:
            return f"{block}.downsamplers.0.conv.{leaf}"
        case ["conv"]:
            return f"{block}.upsamplers.0.conv.{leaf}"
    inner = ".".join(path)
    if inner in RESNET:
        return f"{block}.resnets.{index}.{RESNET[inner]}.{leaf}"
    return f"{block}.attentions.{index}.{inner}.{leaf}"
