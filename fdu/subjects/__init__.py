"""Subjects of an erasure: the digits pipeline or any other, with prompts, probes and judges."""
