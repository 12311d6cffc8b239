"""What notebooks call to let third-party widgets through; notes the calls."""

calls = []


def enable_custom_widget_manager(version="5.0.0a"):
    calls.append("enable_custom_widget_manager")


def disable_custom_widget_manager():
    calls.append("disable_custom_widget_manager")


def no_vertical_scroll():
    calls.append("no_vertical_scroll")
