"""How is an evaluation run without the lines that it prints and logs?"""

import logging
import os
from contextlib import contextmanager, redirect_stdout
from typing import Iterator

from mmengine.logging import MMLogger


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what pycocotools prints and mmengine logs of an evaluation, errors of an empty one too.

    Examples:
        >>> with quiet():
        ...     print('Loading annotations into memory...')
    """
    logger = MMLogger.get_current_instance()
    level = logger.level
    # Not by logging.disable, which mmengine's loggers do not heed.
    logger.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)
