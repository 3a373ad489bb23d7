#!/usr/bin/env python3
"""Build each row of the paper's tables and print its cost beside the paper's.

    python tools/paper_tables.py [--tables 1 2] [--search] [--markdown]

Fails where a deviation is larger than stated; see docs/paper.md.
"""

import sys

from sasa_det.analysis.paper_tables import main

if __name__ == '__main__':
    sys.exit(main())
