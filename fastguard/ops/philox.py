"""The random numbers of attention's dropout, in plain torch. Twin: csrc/philox.h."""

import torch
from torch import Tensor


def dropout_keep_ref(
    seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float
) -> tuple[Tensor, float]:
    """The attention weights that dropout keeps, and their factor: csrc/philox.h in plain torch.

    Args:
        seed: int64 (2,).
        shape: (B, H, T, S).

    Returns:
        bool (B, H, T, S), True with a probability that is a multiple of 2^-16, and its inverse.
    """
    threshold = max(1, int((1.0 - dropout_p) * 65536 + 0.5))
    batch, heads, rows, columns = shape
    device = seed.device
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(columns, device=device)
    call = 4 * (i % 8) + j % 8 // 2
    word = 2 * (j % 16 // 8) + i % 16 // 8
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    low = 0xFFFFFFFF
    counter = torch.broadcast_tensors(i // 16 * 32 + call, j // 16, head, seed[1] & low)
    drawn = torch.stack(_philox(list(counter), [seed[0] & low, seed[0] >> 32 & low]))
    number = drawn.gather(0, word.expand(shape).unsqueeze(0)).squeeze(0)
    number = number >> (16 * (j % 2)) & 0xFFFF
    return number < threshold, 65536 / threshold


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32 of 7 rounds on 32-bit numbers held in int64."""

    def multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
        product = x * by  # may wrap around; the lower 64 bits are right
        return product >> 32 & 0xFFFFFFFF, product & 0xFFFFFFFF

    for _ in range(7):
        high0, low0 = multiply(counter[0], 0xD2511F53)
        high1, low1 = multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter
