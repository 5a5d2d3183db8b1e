"""The command `localsgd`, also `python -m localsgd_jax`."""

_EXTRA = {"click", "matplotlib", "pooch", "scipy", "sklearn", "tqdm"}


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    try:
        from localsgd_jax.cli import cli

        cli(prog_name="localsgd")
    except SystemExit as end:
        if end.code:
            from localsgd_jax.distributed import leave

            leave(end.code if isinstance(end.code, int) else 1)
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise SystemExit(
            'localsgd needs its command-line extra: pip install "localsgd-jax[cli]"'
        ) from None


if __name__ == "__main__":
    main()
