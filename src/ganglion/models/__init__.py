"""Models: policies and their parts. Called by the engine; know nothing of pages, requests or sockets."""
