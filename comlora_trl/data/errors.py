"""The one error of the data modules."""


class DataError(ValueError):
    """Data that is missing or not as expected; its one line names the file, what was expected and what to do."""


def reason_of(error: Exception) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
