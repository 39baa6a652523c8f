"""Separates errors that the user must fix from failures that a restart may resolve."""


class UserError(ValueError):
    """The user must change something: flags, data, permissions.

    A command prints the message as one line and exits with code 2, which the deployment manifests do not retry. The
    message says what was passed, what was expected and what to do.
    """
