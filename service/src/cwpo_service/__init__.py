"""The service that hosts an annotator and accepts batch jobs."""
