"""The supported version of veRL."""

SUPPORTED = "0.9.1"


def require_verl(version: str) -> None:
    """Check veRL's version before it is used.

    The package overrides methods of veRL's trainer and engine that are not a stable interface: another version might
    silently not call them.

    Raises:
        ImportError: ``version`` is not supported.
    """
    if version.split("+")[0] != SUPPORTED:
        raise ImportError(
            f"veRL {version} is installed, but tts_grpo.training supports only veRL {SUPPORTED}: run bash run.sh -1 to "
            "install it. To support another version, compare the methods that tts_grpo/training overrides with veRL's, "
            "run tests/test_trainer.py and tests/test_training.py, and change SUPPORTED in "
            "tts_grpo/training/verl_version.py"
        )
