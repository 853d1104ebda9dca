"""Passes over onnx_ir models, one a file."""
