"""Commands of `localsgd`."""
