"""How does one tensor become few bytes and come back (alone, without any network)?"""

from distcomp.compressors.base import Compressor
from distcomp.compressors.cast import Cast
from distcomp.compressors.identity import Identity
from distcomp.compressors.quantize import Quantize

__all__ = ["Cast", "Compressor", "Identity", "Quantize"]
