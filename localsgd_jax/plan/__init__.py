"""`localsgd plan`: which period pays on a network."""
