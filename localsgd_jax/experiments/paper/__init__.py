"""Experiments of Stich 2019, Local SGD Converges Fast and Communicates Little."""
