"""Engine: plan -> run -> commit over pages. Called by `pipeline`; knows no sockets, robots or contracts."""
