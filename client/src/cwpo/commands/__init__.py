"""The subcommands that the client brings; `cwpo.cli` runs them."""
