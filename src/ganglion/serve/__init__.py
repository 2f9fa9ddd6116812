"""Serve: sockets in, `Service` calls out. The only importer of the web framework."""
