"""`python -m trl.cli`, for where the console script is not on the path."""

import sys

from .main import main

sys.exit(main())
