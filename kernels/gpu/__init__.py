"""The kernels in Triton, for CUDA and ROCm: same names and bytes as `ggez_kernels.cpu`, on torch tensors.

Nothing waits for the device: statistics are tensors on it, to be converted when the caller wants to wait.
"""
