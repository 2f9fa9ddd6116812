"""Programs of other people's clients, run by `make clients`' own Python against a server: each prints one JSON object."""
