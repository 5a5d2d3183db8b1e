"""Entry point of the command `localsgd`, also `python -m localsgd_jax`."""

_EXTRA = {"click", "matplotlib", "plotly", "pooch", "scipy", "sklearn", "tqdm"}


def main() -> None:
    """Runs the command line; prints an install hint if a dependency is missing."""
    try:
        from localsgd_jax.cli.main import cli

        cli(prog_name="localsgd")
    except SystemExit as end:
        if end.code:
            from localsgd_jax.distributed.shutdown import exit_process

            # `sys.exit` would block in the shutdown barrier of a job.
            exit_process(end.code if isinstance(end.code, int) else 1)
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise SystemExit(
            "Error: localsgd needs its command-line extra: "
            'pip install "localsgd-jax[cli]"'
        ) from None


if __name__ == "__main__":
    main()
