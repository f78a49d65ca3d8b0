"""The steps of a job: plan, annotate, merge."""
