"""The one error of the commands. `lifecycle.__main__` catches it, prints its line and exits with 1."""


class LifecycleError(Exception):
    """A command cannot do what it was asked; the message is one line for a person.

    It names the file, version or option that is wrong, and where possible the command that helps.
    """
