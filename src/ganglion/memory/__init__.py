"""Memory: pages by id, and the bytes behind them. Called by the engine; knows no models, requests or sockets."""
