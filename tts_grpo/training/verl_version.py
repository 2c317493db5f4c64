"""The version of veRL that this package was written for."""

SUPPORTED = "0.9.1"


def require_verl(version: str) -> None:
    """Check veRL's version before anything of it is used.

    The package overrides methods of veRL's trainer and engine that are no stable interface: with another version they
    might silently not be called.

    Raises:
        ImportError: ``version`` is not the supported one.
    """
    if version.split("+")[0] != SUPPORTED:
        raise ImportError(
            f"veRL {version} is installed, but tts_grpo.training was written for veRL {SUPPORTED}: run bash run.sh -1, "
            "which installs it; for another version, compare the methods that tts_grpo/training overrides with veRL's, "
            "run tests/test_trainer.py and tests/test_training.py, then change SUPPORTED in "
            "tts_grpo/training/verl_version.py"
        )
