"""From source shards to the pixels that are encoded: read, decode, transform."""
