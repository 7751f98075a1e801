"""Compare divergences on one model: make the runs, draw erased against retained, and recommend one."""
