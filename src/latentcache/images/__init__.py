"""Read, decode and transform the images of source shards."""
