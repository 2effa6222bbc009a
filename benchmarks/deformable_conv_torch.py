"""The same operation in plain PyTorch: `grid_sample` of all points at once, weighted and added up.

This is what DCNv3 falls back to without its CUDA extension. `grid_sample` takes map and positions
of one dtype, here float32, as autocast would choose: in bfloat16 positions would be off by
fractions of a pixel.
"""

import functools

from pallas.deformable_conv.geometry import Sampling


def sampling(geometry: Sampling, device: str, dtype):
    """A PyTorch function that takes and gives what `deformable_sampling` does."""
    import torch

    # -1 and 1 are the outer borders of the map: pixel x of W lies at (2·x + 1)/W - 1.
    size = torch.tensor([geometry.width, geometry.height], dtype=torch.float32)
    points = geometry.centers()[:, :, :, None] + geometry.offset_scale * geometry.grid()
    points = (2 * torch.tensor(points, dtype=torch.float32) + 1) / size - 1
    return functools.partial(
        _sampling, points=points.to(device), scale=(2 * geometry.offset_scale / size).to(device)
    )


def _sampling(value, offsets, mask, *, points, scale):
    from torch.nn import functional

    batch, height, width, groups, channels = value.shape
    out_height, out_width, count = offsets.shape[1], offsets.shape[2], offsets.shape[4]
    maps = value.permute(0, 3, 4, 1, 2).reshape(batch * groups, channels, height, width)
    grid = (points + scale * offsets).permute(0, 3, 1, 2, 4, 5)  # [B, G, Ho, Wo, P, 2]
    samples = functional.grid_sample(
        maps.to(grid.dtype),
        grid.reshape(batch * groups, -1, count, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )  # [B·G, C, Ho·Wo, P]
    weights = mask.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, -1, count)
    out = (samples * weights).sum(-1).view(batch, groups, channels, out_height, out_width)
    return out.permute(0, 3, 4, 1, 2).to(value.dtype).contiguous()
