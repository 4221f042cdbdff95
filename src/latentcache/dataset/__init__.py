"""The dataset format: contract, data files, receipts, manifests, and the code that reads them."""
