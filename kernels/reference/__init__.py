"""The kernels in plain torch: what each of them means, and the backend where numba has no wheel.

Same names, signatures and bytes as `ggez_kernels.cpu`, on whole tensors instead of strips.
"""
