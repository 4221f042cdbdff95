"""Decoders compared over the same latents: the table of a model card."""
