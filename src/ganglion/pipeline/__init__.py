"""Pipeline: sessions and the in-process Service. Called by `cli` and `bench`; knows no sockets."""
