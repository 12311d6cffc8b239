"""Secrets of a Colab user: here there are none."""


class SecretNotFoundError(Exception):
    pass


class NotebookAccessError(Exception):
    pass


class TimeoutException(Exception):
    pass


def get(key):
    raise SecretNotFoundError(f"Secret {key} does not exist.")
