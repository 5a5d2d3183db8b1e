"""Programs for TPU pods and GPU hosts, compiled ahead of time and read, not run."""
