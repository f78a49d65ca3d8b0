"""What cwpo is measured against, a module each."""
