"""``python -m sasa_det.cli`` is ``sasa-det``."""

import sys

from .main import main

sys.exit(main())
