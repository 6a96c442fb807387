"""The one exception type for mistakes a person can mend, and the errors of a full disk."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the ``OSError`` that the command line has a message for."""


class UserError(Exception):
    """A bad flag, file, image, checkpoint or model.

    The message names what is wrong, what was expected and what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class DivergedError(UserError):
    """A loss, a gradient, or what an update made, is not finite. A comparison of optimizers records it and goes on."""
