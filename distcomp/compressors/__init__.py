"""How does one tensor become few bytes and come back (alone, without any network)?"""

from distcomp.compressors.base import Compressor, parse_compressor, register_compressor, register_preset
from distcomp.compressors.cast import Cast
from distcomp.compressors.dct import DctTopK
from distcomp.compressors.fixed import FixedPoint
from distcomp.compressors.identity import Identity
from distcomp.compressors.minifloat import MXFP4, MXFP8, NVFP4, Float8
from distcomp.compressors.natural import Natural, NonUniform
from distcomp.compressors.quantize import Quantize
from distcomp.compressors.sign import OneBit, ScaledSign
from distcomp.compressors.sparse import IndexCode
from distcomp.compressors.topk import Chain, RandomK, Sparsifier, TopK

__all__ = [
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "Cast",
    "Chain",
    "Compressor",
    "DctTopK",
    "FixedPoint",
    "Float8",
    "Identity",
    "IndexCode",
    "Natural",
    "NonUniform",
    "OneBit",
    "Quantize",
    "RandomK",
    "ScaledSign",
    "Sparsifier",
    "TopK",
    "parse_compressor",
    "register_compressor",
    "register_preset",
]
