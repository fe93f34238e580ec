# SPDX-License-Identifier: Apache-2.0
"""4-bit quantization: codebooks, blockwise codec, QuantizedArray, and matmul against it."""

from .array import QuantizedArray as QuantizedArray
from .array import dequantize as dequantize
from .array import quantize_array as quantize_array
from .array import quantize_rows as quantize_rows
from .matmul import quantized_matmul as quantized_matmul
from .streaming import stream as stream
