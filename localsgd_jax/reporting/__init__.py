"""Records of runs for files, loggers and reports."""

from localsgd_jax.reporting.loggers import to_all, to_clu, to_tensorboard, to_wandb
from localsgd_jax.reporting.page import write_report
from localsgd_jax.reporting.records import to_csv, to_jsonl, to_run_directory
from localsgd_jax.reporting.run_files import Run, columns_of, read_run

__all__ = [
    "Run",
    "columns_of",
    "read_run",
    "to_all",
    "to_clu",
    "to_csv",
    "to_jsonl",
    "to_run_directory",
    "to_tensorboard",
    "to_wandb",
    "write_report",
]
