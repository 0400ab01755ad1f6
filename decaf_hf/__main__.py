"""`python -m decaf_hf` is the `decaf` command."""

import sys

from .cli import main

sys.exit(main())
