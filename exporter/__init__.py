"""The compiler core: registries, tracing, ONNX, passes, operators and the bundle. Imports nothing else of isthmus."""
