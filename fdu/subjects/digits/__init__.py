"""The digits pipeline: a latent text-to-image pipeline of handwritten digits in coloured ink, and its judge."""
