"""Random shapes and options; ``tools/check_draws.py`` draws more."""

import subprocess
import sys
from pathlib import Path

from cases import backends

TOOL = Path(__file__).parents[2] / 'tools' / 'check_draws.py'


@backends('eager', 'native')
def test_two_hundred_draws_agree_with_the_reference(backend):
    command = [sys.executable, str(TOOL), '--draws', '200', '--backend', backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '200 draws, 0 disagree' in done.stdout
