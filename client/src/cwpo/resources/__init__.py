"""The calls of the REST contract, one file a resource, sync and async side by side."""
