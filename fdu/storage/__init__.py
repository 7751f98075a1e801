"""Files on disk: weights in every format; folders and files are written whole or not at all."""
