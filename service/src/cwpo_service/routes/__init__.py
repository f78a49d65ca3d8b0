"""The calls of the REST contract, a module a resource."""
