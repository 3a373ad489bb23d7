#!/usr/bin/env python3
"""Write the README and the metafile of each family of configs, from what was counted and measured.

    python tools/model_zoo.py [--plot docs/images/measured.png]

Exits with 1 if anything changed. Accuracies come from configs/measured.json.
"""

import sys

from sasa_det.analysis.model_zoo import main

if __name__ == '__main__':
    sys.exit(main())
