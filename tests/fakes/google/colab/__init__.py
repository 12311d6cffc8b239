"""Stands in for Colab's own package in tests. `google` stays a namespace, so google.protobuf still imports."""

from . import output, userdata  # noqa: F401
