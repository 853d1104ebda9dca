"""The TensorRT plugins: `libisthmus_trt`, one creator for each ONNX node type of the operators, and how it is built and tested.

The library links against nothing of NVIDIA's: TensorRT hands it its interfaces, and the CUDA driver is opened at run time. What it launches
are the plans of the operators' `gpu.py`, as tables that `tables` generates, with the kernels that were compiled ahead of time inside.
"""
