"""isthmus carries PyTorch image-generation models to the hardware that serves them."""

__version__ = "0.1.0"
