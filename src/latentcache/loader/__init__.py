"""Load batches of a latent dataset for a training loop."""
