"""The models that can be trained: loading, and a file for each family of denoisers."""
