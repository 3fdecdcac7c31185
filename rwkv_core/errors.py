"""Errors that a person can act on: each says the value, the rule it breaks, and the remedy, in that order.

Whoever runs a stage shows the message without a traceback; any other exception is a defect of ours and keeps its traceback.
"""


class Problem(Exception):
    """Something a person can put right."""

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(value, rule, remedy)
        self.value, self.rule, self.remedy = value, rule, remedy

    def __str__(self) -> str:
        return f"{self.value}: {self.rule}; {self.remedy}"


class InputError(Problem, ValueError):
    """What was given cannot be used: a file, a row, a setting."""


class WorldError(Problem, RuntimeError):
    """What was given is fine but the world is not: no space, no permission, no such device."""


class Interrupted(Exception):
    """A signal asked the work to stop; it saved what it had first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(signum, message)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message
