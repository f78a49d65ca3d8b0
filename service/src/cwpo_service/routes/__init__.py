"""The calls of the REST API, with one module for each resource."""
