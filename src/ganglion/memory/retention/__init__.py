"""Retention: which cached pages stay. One policy a file, all behind `value.Value`."""
