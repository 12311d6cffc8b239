"""`python -m mixoff`."""

import sys

from mixoff.commands.cli import main

sys.exit(main())
