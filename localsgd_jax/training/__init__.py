"""Training loop, dispatches, history and callbacks."""
