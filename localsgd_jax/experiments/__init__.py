"""Experiments of the command line: datasets, logistic regression, runs and figures."""
