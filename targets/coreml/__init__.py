"""Core ML: ML Programs for Apple's devices."""
