"""The command line: `mixoff COMMAND`, one module per command. Values are checked before torch is imported.

`argparse` rather than typer: one line per error, did-you-mean and checks before imports would be rewritten on click.
"""
