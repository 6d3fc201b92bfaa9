"""What the user can mend, apart from bugs.

Commands and stages show a `UserError` as its message alone. Every other exception is a bug and keeps its traceback:
a `ValueError` of numpy, say, tells the user nothing that they could do.
"""


class UserError(Exception):
    """A mistake or mishap outside this code. The message names the thing, the value and the remedy."""


class FileError(UserError):
    """A file or folder is not what it should be; the message names it and what is wrong with it."""


class CheckpointError(FileError):
    """A file of weights does not hold what it should; the message names the file and the keys."""


class StorageError(UserError):
    """An artifact is missing, unfinished or altered, or its storage fails; the message names it and the remedy."""
