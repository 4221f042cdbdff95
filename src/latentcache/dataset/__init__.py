"""What lies on disk: contract, shards, receipts, manifests, and the reader over them."""
