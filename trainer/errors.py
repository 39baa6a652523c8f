"""What tells a mistake that the user can mend from a failure that a restart may mend."""


class UserError(ValueError):
    """The user must change something: flags, data, permissions.

    A command that meets it prints its text as one line and ends with exit code 2, which the platforms are told
    not to retry. The text says what came, what was expected and what to do.
    """
