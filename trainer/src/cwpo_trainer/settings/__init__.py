"""What the commands can be told: data without behaviour, and without torch.

Each field is a flag, a key of the --config file and, as CWPO_NAME, an environment variable.
"""
