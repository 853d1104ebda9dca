"""What the GPU kernels of all operators share: launches as data, and how they are compiled and interpreted without a GPU."""
