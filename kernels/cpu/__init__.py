"""The kernels compiled for the processor with numba: one pass over memory, no global interpreter lock."""
