"""The rules of `isthmus lint` about TensorRT and TensorRT-RTX, one concept a file. `exporter.lint` says what a rule is."""
