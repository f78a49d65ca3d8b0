"""The one path from prompt and response to token ids."""
