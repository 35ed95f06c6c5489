"""What libraries take for themselves while an operator runs, measured on the library, or known from PyTorch's source.

The patch embedding's convolution has scratch space that is the library's own affair and has no formula: oneDNN reorders
images and weights into blocks of 16 or 32 channels where the processor has bfloat16 arithmetic (6 MB forward, 10 MB
backward for 16x16 patches of 3 channels, whatever the batch) and unfolds the image where it has none. So one and two
images are run once, on zeros, and other batches follow the line through both.

Products in bf16 on a CPU: oneDNN copies what it multiplies into blocks, a buffer a thread, up to .8 MB each. The
gradient of a weight is computed once, on zeros, too; rows beyond ``MOST_ROWS`` add next to nothing.

Fused attention on a CPU: a buffer a thread for blocks of queries and keys, of the sizes that PyTorch chooses
(``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from m3bsr.cost.memory import peak_growth
from m3bsr.cost.stages import FLOAT, Bytes

MOST_ROWS = 2048


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


def product_growth(rows: int, out_dim: int, in_dim: int, size: Bytes) -> int:
    """Scratch space of the gradient of a weight ``[out, in]`` over ``rows`` tokens: bytes."""
    if size.work == FLOAT or not size.threads:
        return 0
    present = torch.get_num_threads()
    return _product_growth(min(rows, MOST_ROWS), out_dim, in_dim, present) * size.threads // present


@cache
def _product_growth(rows: int, out_dim: int, in_dim: int, threads: int) -> int:
    upstream, inputs = (torch.zeros(rows, dim, dtype=torch.bfloat16) for dim in (out_dim, in_dim))
    return peak_growth(lambda: (upstream.t() @ inputs).shape) - 2 * out_dim * in_dim


def fused_attention_growth(tokens: int, keys: int, head_dim: int, threads: int, work: int) -> tuple[int, int]:
    """Bytes of all buffers of ``scaled_dot_product_attention``, forward and backward."""
    rows = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    block = rows * min(keys, 512)
    reduced = 0 if work == FLOAT else work * block
    return threads * (FLOAT * (block + rows * (2 + head_dim)) + reduced), threads * 2 * (FLOAT * block + reduced)
