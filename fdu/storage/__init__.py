"""What lies on disk: weights in every format, and folders and files that are written whole or not at all."""
