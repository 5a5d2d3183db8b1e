"""Core types, the algorithm of one worker, collectives and validation."""
