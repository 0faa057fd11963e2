"""How a run ends early, each class one exit code of the command line; and what ends a record."""


class UserError(Exception):
    """Bad input (exit code 2). The message is one line that names the cause and the cure."""


class Late(Exception):
    """Another process did not come, or cannot be reached (exit code 1). It may yet: a slice that
    was taken away comes back minutes after the others. The message is as a UserError's."""


class GuardStop(Exception):
    """A guard stopped the run (exit code 3): non-finite loss, collapsed targets. State is saved."""


class Terminated(Exception):
    """SIGTERM or a preemption notice (exit code 143). State is saved."""


class Undecodable(ValueError):
    """A record holds no readable image or sound; the pipeline replaces it by the next good one."""
