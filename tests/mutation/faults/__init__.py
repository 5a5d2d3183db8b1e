"""Planted faults, one module for each folder of the package."""
