"""`python -m cwpo` is the `cwpo` command."""

from cwpo.cli import main

main()
