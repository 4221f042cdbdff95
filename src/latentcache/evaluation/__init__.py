"""Compare decoders on the same latents, and write the table of a model card."""
