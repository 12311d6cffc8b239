"""`python -m mixoff`."""

import sys

from mixoff.cli import main

sys.exit(main())
