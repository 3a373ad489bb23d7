"""Install a wheel for several Pythons, without a compiler, and compare its C++ kernels with the reference.

    python tools/checks/wheel.py dist/sasa_det-*.whl /path/to/python ...

Each Python needs torch and pip. Nothing is installed into it: the wheel goes to a temporary folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Optional, Sequence

# Runs in the other Python, which has torch alone.
COMPARE = """
import platform
import sys

import torch
import sasa_det
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import available_backends, local_attention

if not sasa_det.__file__.startswith(sys.argv[1]):
    sys.exit(f'sasa_det is {sasa_det.__file__}, and not the one of the wheel')
why_not = available_backends()['native']
if why_not is not None:
    sys.exit(f'no native kernels: {why_not}')
largest = 0.0
for dtype in (torch.float64, torch.float32):
    for border, dilation in (('zeros', 1), ('mask', 2)):
        torch.manual_seed(0)
        inputs = [torch.randn(2, 8, 40, 21, dtype=dtype, requires_grad=True) for _ in range(3)]
        inputs += [torch.randn(2, 2, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
        results = []
        for backend in ('native', 'reference'):
            options = dict(kernel_size=5, num_heads=2, dilation=dilation, border=border)
            output = local_attention(*inputs, **options, backend=backend)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        for ours, truth in zip(*results):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=2e-3 if dtype == torch.float32 else 1e-9)
            if dtype == torch.float64:
                largest = max(largest, (ours - truth).abs().max().item())
# Without gradients the dispatcher calls the kernels itself.
layer = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2).eval()
with torch.no_grad():
    assert layer(torch.randn(1, 8, 6, 7)).shape == (1, 8, 6, 7)
from sasa_det.ops.backends.native import _native
print(
    f'Python {platform.python_version()}, torch {torch.__version__}: {_native.capability()} kernels on '
    f'{_native.threads()} threads, at most {largest:.1e} from the reference in float64'
)
"""


def check(wheel: Path, python: str) -> str:
    """Install a wheel for one Python and run its kernels.

    Args:
        wheel: The file.
        python: The Python, which has torch.

    Returns:
        One line: the versions, the kernels and the largest difference to the reference.

    Raises:
        RuntimeError: The wheel cannot be installed, has no kernels for this torch, or they compute
            something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Resolved, as sasa_det.__file__ is compared with it. An empty PATH has no compiler.
        folder = str(Path(folder).resolve())
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith('PYTHON')
        }
        environment['PATH'] = ''
        pip = [python, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index']
        for command in (
            [*pip, '--target', folder, str(wheel)],
            [python, '-c', COMPARE, folder],
        ):
            environment['PYTHONPATH'] = '' if command[2] == 'pip' else folder
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f'{wheel.name} with {python}: {done.stdout}{done.stderr}')
    return done.stdout.splitlines()[-1]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command.

    Args:
        arguments: The command line's, without the program's name.

    Returns:
        The exit status: 1 if the wheel failed with one of the Pythons.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('wheel', type=Path)
    parser.add_argument('python', nargs='*', default=[sys.executable], help='default: this one')
    options = parser.parse_args(arguments)
    status = 0
    for python in options.python:
        try:
            print(check(options.wheel.resolve(), python), flush=True)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
