"""What a user can mend, and why a run had to stop."""


class InputError(ValueError):
    """Something that was given cannot be used.

    The message names the thing, its value, what was expected and what to do. Command-line programs
    print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training had to stop for a reason that lies in the run; the message says where it stands."""
