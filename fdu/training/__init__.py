"""The training loop and its parts, a file each."""
