"""Subjects of an erasure: a pipeline of fdu or any other, with prompts, probes and judges."""
