"""`python -m snapfs` is the command snapfs."""

import sys

from .cli import main

sys.exit(main())
