"""`libisthmus_ops`: the operators' CPU kernels in C++, for ONNX Runtime and for the torch operators.

Each operator's kernel is `kernel.cpp` in its folder; what they share, the tables made from the schemas, the C interface and the custom ops
of ONNX Runtime are here. `python -m isthmus.exporter.ops.native` builds the library where there are CMake and a C++ compiler; without it
everything works through the ONNX nodes' bodies and the torch form.
"""

from __future__ import annotations

from .binding import Buffer, Library, load
from .cmake import build, library, state

__all__ = ["Buffer", "Library", "build", "library", "load", "state"]
