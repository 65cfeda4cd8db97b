"""`python -m harness` is `fitmatrix`."""

import sys

from harness.cli import main

sys.exit(main())
