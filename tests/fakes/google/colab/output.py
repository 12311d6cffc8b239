"""What notebooks call to let third-party widgets through; notes the calls."""

import types

calls = []
_widgets = types.SimpleNamespace(_installed_url=None)  # anywidget tells the frontend where the manager lies


def enable_custom_widget_manager(version="5.0.0a"):
    calls.append("enable_custom_widget_manager")
    _widgets._installed_url = f"https://widgets.invalid/{version}/manager.min.js"


def disable_custom_widget_manager():
    calls.append("disable_custom_widget_manager")


def no_vertical_scroll():
    calls.append("no_vertical_scroll")
