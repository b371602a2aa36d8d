"""`python -m nasbench` is the command `nasbench`."""

from __future__ import annotations

import sys

from nasbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
