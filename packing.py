"""Codes of 1 to 8 bits as dense bytes, and back."""

import numpy as np
import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (uint8, any shape, n numbers below 2^bits, 1 <= bits <= 8) → uint8 [ceil(n * bits / 8)], densely.

    Low bits first; a code may straddle two bytes; the last byte is padded with zeros. For 3 bits, codes a, b, c, ...:

        bit     7   6   5   4   3   2   1   0
        byte 0  c1  c0  b2  b1  b0  a2  a1  a0
        byte 1  f0  e2  e1  e0  d2  d1  d0  c2

    ValueError where a code does not fit.
    """
    flat = codes.detach().cpu().reshape(-1).numpy()
    if not 1 <= bits <= 8 or codes.dtype != torch.uint8 or (flat.size and int(flat.max()) >> bits):
        raise ValueError(f"codes must be uint8 below 2^bits with 1 to 8 bits; bits is {bits}, dtype {codes.dtype}")
    each = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [count]. ValueError if `packed` has the wrong length or its padding is not
    zero."""
    if not 1 <= bits <= 8 or packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(f"{count} codes of {bits} bits do not take {packed.numel()} bytes")
    stream = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if stream[count * bits :].any():
        raise ValueError("bits set behind the last code")
    columns = stream[: count * bits].reshape(count, bits)
    codes = np.zeros(count, np.uint8)
    for bit in range(bits):
        codes |= columns[:, bit] << bit
    return torch.from_numpy(codes)


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
