"""The backends, a file or folder each, that compute the calls of fdu_kernels.calls; fdu_kernels.registry names them."""
