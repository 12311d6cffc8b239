"""The command line: `mixoff COMMAND`. Values are checked before torch is imported."""
