"""What the patch embedding's convolution takes while it runs, measured on the library that runs it.

Its scratch space is the library's own affair and has no formula: oneDNN reorders images and weights into blocks of 16
or 32 channels where the processor has bfloat16 arithmetic (6 MB forward, 10 MB backward for 16x16 patches of 3
channels, whatever the batch) and unfolds the image where it has none. So one and two images are run once, on zeros,
and other batches follow the line through both.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from m3bsr.cost.memory import peak_growth


@cache
def convolution_growth(
    weight_shape: tuple[int, ...], image_size: tuple[int, int], device: str = "cpu", autocast: bool = False
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Highest growth of memory, forward and backward: bytes of one image, and of each further one.

    The forward pass has its result in it, the backward pass (gradient of the weight only) the weight's gradient.
    """
    peaks = [_growth(weight_shape, image_size, device, autocast, batch) for batch in (1, 2)]
    (one_forward, one_backward), (two_forward, two_backward) = peaks
    return (one_forward, two_forward - one_forward), (one_backward, two_backward - one_backward)


def _growth(
    weight_shape: tuple[int, ...], image_size: tuple[int, int], device: str, autocast: bool, batch: int
) -> tuple[int, int]:
    images = torch.zeros(batch, weight_shape[1], *image_size, device=device)
    weight = torch.zeros(weight_shape, device=device, requires_grad=True)
    stride = list(weight_shape[2:])

    def forward() -> torch.Tensor:
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=autocast):
            return F.conv2d(images, weight, stride=stride)

    result = forward()
    upstream, weight.grad = torch.zeros_like(result), None
    growth = peak_growth(lambda: forward().shape, device)
    return growth, peak_growth(lambda: result.backward(upstream), device)
