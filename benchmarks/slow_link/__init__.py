"""Training over throttled links between two hosts in network namespaces."""
