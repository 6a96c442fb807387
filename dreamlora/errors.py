"""The one exception type for mistakes a person can mend."""


class UserError(Exception):
    """A bad flag, file, image, checkpoint or model.

    The message names what is wrong, what was expected and what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class DivergedError(UserError):
    """A loss, a gradient, or what an update made, is not finite. A comparison of optimizers records it and goes on."""
