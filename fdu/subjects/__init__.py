"""What a concept is erased from: a pipeline embedded in fdu, or any other; its prompts, probes and judges."""
