"""What does a compiled CUDA kernel consist of? Its instructions, loops and memory, by NVIDIA's disassembler."""

import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

# Triton brings them.
TOOLS = ('nvdisasm', 'cuobjdump')


class Loop(NamedTuple):
    """Where a loop lies in a kernel: places of its first and of its last instruction."""

    begin: int
    end: int


class Code(NamedTuple):
    """A compiled kernel.

    Attributes:
        names: Of its instructions with their suffixes, in order.
        loops: By the place of the last instruction.
        usage: 'REG' registers of a thread; 'STACK' and 'LOCAL' bytes of its local memory.
    """

    names: List[str]
    loops: List[Loop]
    usage: Dict[str, int]


def missing() -> str:
    """Say which tool is missing; empty if none is."""
    for name in TOOLS:
        if find_tool(name) is None:
            return f'{name} was not found, neither in Triton nor on the PATH'
    return ''


def find_tool(name: str) -> Optional[str]:
    """Find a tool that reads compiled kernels.

    Args:
        name: One of TOOLS.
    """
    found = find_spec('triton')
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / 'backends' / 'nvidia' / 'bin' / name
        if path.is_file():
            return str(path)
    return shutil.which(name)


def disassemble(code: bytes) -> Code:
    """Read a compiled kernel.

    Args:
        code: A cubin of one kernel.

    Raises:
        subprocess.CalledProcessError: It is no cubin.
    """
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(code)
        file.flush()
        text = _run('nvdisasm', '-c', file.name)
        usage = _run('cuobjdump', '-res-usage', file.name)
    numbers = {name: int(number) for name, number in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
    return Code(*parse(text), numbers)


def parse(text: str) -> Tuple[List[str], List[Loop]]:
    """Find the instructions and the loops in a disassembled kernel.

    Args:
        text: What nvdisasm prints.

    Examples:
        >>> parse('''
        ...         /*0000*/  MOV R1, c[0x0][0x28] ;
        ... .L_x_0:
        ...         /*0010*/  FADD R2, R2, R1 ;
        ...         /*0020*/  @P0 BRA `(.L_x_0) ;
        ... ''')
        (['MOV', 'FADD', 'BRA'], [Loop(begin=1, end=2)])
    """
    names, places, jumps = [], {}, []
    for line in text.splitlines():
        label = re.match(r'\s*(\.L_[\w.$]+):', line)
        if label:
            places[label[1]] = len(names)
        found = re.match(
            r'\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);', line
        )
        if found:
            to = re.search(r'`\((\.L_[\w.$]+)\)', found[2])
            if found[1].startswith('BRA') and to:
                jumps.append((len(names), to[1]))
            names.append(found[1])
    loops = [Loop(places[to], at) for at, to in jumps if places.get(to, len(names)) <= at]
    return names, loops


def is_product(name: str) -> bool:
    """Say whether an instruction is a product of matrices."""
    return name.startswith('HMMA')


def loop_of_products(code: Code) -> Loop:
    """Find the innermost loop that has all products of a kernel.

    Args:
        code: The kernel.
    """
    most = sum(map(is_product, code.names))
    return min(
        (
            loop
            for loop in code.loops
            if sum(map(is_product, code.names[loop.begin : loop.end + 1])) == most
        ),
        key=lambda loop: loop.end - loop.begin,
    )


def _run(name: str, option: str, path: str) -> str:
    command = [find_tool(name), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
