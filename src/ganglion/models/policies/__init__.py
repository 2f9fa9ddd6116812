"""Robot policies: each family is one file with the same public calls."""
