"""The one error of the data modules."""


class DataError(ValueError):
    """Data that is missing or not as expected; its one line names the file, what was expected and what to do."""
