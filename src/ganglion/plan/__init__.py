"""Plan: what work costs and what fits, as pure numbers. Called by engine and cli; touches no device."""
