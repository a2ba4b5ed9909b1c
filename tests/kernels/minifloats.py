"""Floats of 4 and 8 bits in plain NumPy, from the standard's tables: every magnitude a format has, and no
formula of ours. What the tests of kernels and of compressors compare with."""

from __future__ import annotations

import numpy as np

TABLES = {
    "e4m3": (4, 3, 7, 0x7E),
    "e5m2": (5, 2, 15, 0x7B),
    "e2m1": (2, 1, 1, 0x7),
}
"""Bits of the exponent, bits behind the point, bias, and the code of the largest number."""


def numbers(name: str) -> np.ndarray:
    """The magnitude that each code from 0 on stands for, float64."""
    exponent_bits, mantissa_bits, bias, largest = TABLES[name]
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                values.append(2.0 ** (1 - bias) * fraction)
            else:
                values.append(2.0 ** (exponent - bias) * (1 + fraction))
    return np.array(values[: largest + 1])


def neighbours(name: str, magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the numbers at or below and above each finite magnitude; the largest twice beyond it."""
    table = numbers(name)
    below = np.searchsorted(table, magnitude, side="right") - 1
    return below, np.minimum(below + 1, len(table) - 1)


def nearest(name: str, magnitude: np.ndarray) -> np.ndarray:
    """The code of the nearest number; of two as near the even one."""
    table = numbers(name)
    low, high = neighbours(name, magnitude)
    to_low, to_high = magnitude - table[low], table[high] - magnitude
    even = np.where(low % 2 == 0, low, high)
    return np.where(
        magnitude >= table[-1],
        len(table) - 1,
        np.where(to_low < to_high, low, np.where(to_low > to_high, high, even)),
    )


def at_random(name: str, magnitude: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The upper neighbour with the probability of how far the magnitude has come on the way to it."""
    table = numbers(name)
    low, high = neighbours(name, magnitude)
    distance = np.where(high > low, table[high] - table[low], 1.0)
    share = np.where(high > low, (magnitude - table[low]) / distance, 0.0)
    return np.where(u + share >= 1, high, low)
