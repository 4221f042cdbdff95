"""From a latent dataset to the batches of a training loop."""
