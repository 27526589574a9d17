"""Run a command as `python -m freehold.cli`."""

import sys

from freehold.cli.main import main

sys.exit(main())
