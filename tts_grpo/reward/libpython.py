"""Find this Python's shared library, with which PyTriton's backend links.

As a program, it needs no packages: ``python -I tts_grpo/reward/libpython.py`` exits with status 1 and says what to do
if the Python that runs it has no shared library.
"""

import ctypes.util
import sys
import sysconfig
from pathlib import Path

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
NAME = f"libpython{VERSION}.so.1.0"  # the backend links with this name


def libpython_folder() -> Path | None:
    """Return the folder that holds this Python's shared library, or None if it has none.

    uv's Pythons are built in another folder than they are installed in, so that their LIBDIR does not exist. conda's
    are linked statically, but come with a shared library. A statically linked Python must not use another's library.
    """
    folders = [Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent"), Path(sys.base_prefix) / "lib"]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        multiarch = sysconfig.get_config_var("MULTIARCH") or ""  # Debian's folder of libraries
        folders += [folder / multiarch for folder in folders]
    return next((folder for folder in folders if (folder / NAME).exists()), None)


def libpython_fault() -> str:
    """Return why the reward server cannot run with this Python, with what to do; "" if it can."""
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED")
    if libpython_folder() or (shared and ctypes.util.find_library(f"python{VERSION}")):
        return ""
    if "pyenv" in sys.base_prefix:
        patch = ".".join(map(str, sys.version_info[:3]))
        remedy = f"run PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install --force {patch}"
    elif shared:
        remedy = f"install it (Debian: apt-get install libpython{VERSION})"
    else:
        remedy = "build Python with --enable-shared"
    return (
        f"{sys.executable} has no shared library {NAME}, which the reward server needs: {remedy}, or set base_python "
        "to another Python (those of conda and uv have one) and run bash run.sh -1 -1"
    )


if __name__ == "__main__":
    sys.exit(libpython_fault() or None)
