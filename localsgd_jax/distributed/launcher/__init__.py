"""Process launcher of `localsgd launch`; uses the standard library only."""
