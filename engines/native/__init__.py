"""The `native` backend: the joint encoder in our own kernels, needing only NVIDIA's driver."""
