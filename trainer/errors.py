"""Separates errors that the user must fix from failures that a restart may resolve."""

import importlib.util


class UserError(ValueError):
    """The user must change something: flags, data, permissions.

    A command prints the message as one line and exits with code 2, which the deployment manifests do not retry. The
    message says what was passed, what was expected and what to do.
    """


def require_posix() -> None:
    """Raises UserError on Windows, which has no file locks as Linux and macOS have them."""
    if importlib.util.find_spec("fcntl") is None:
        raise UserError(
            "This system is not supported: Linux or macOS is expected. On Windows, install and run the project in WSL "
            "(https://learn.microsoft.com/windows/wsl/install)."
        )
