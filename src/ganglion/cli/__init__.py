"""The command line: the composition root, the one place where concrete classes meet."""
