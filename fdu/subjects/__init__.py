"""Subjects of an erasure: the embedded pipeline or any other, with prompts, probes and judges."""
