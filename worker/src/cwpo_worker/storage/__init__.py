"""Storage: the blob store, uploads, and inputs below a prefix."""
