"""The experiments of the paper, each in a file of its own."""
