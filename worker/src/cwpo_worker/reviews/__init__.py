"""Reviews: rows of a job's dataset that people label in the service's page."""
