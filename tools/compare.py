#!/usr/bin/env python3
"""Train configs with several seeds and set accuracy against cost.

    python tools/compare.py CONFIG... --work-dir DIR [--seeds 3] [--cfg-options KEY=VALUE...]

Any config that mmdet trains, on any data in COCO's format. Interrupt it as you like: the same command
goes on from the last checkpoint, and leaves alone what is done.
"""

import sys

from sasa_det.analysis.compare import main

if __name__ == '__main__':
    sys.exit(main())
