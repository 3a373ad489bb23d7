"""How a detector is written as an ONNX file."""

import json
import logging
import os
import warnings
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import List, Union

import torch
from torch import nn

from ..version import __version__
from .decoded import Candidates, DecodedDetector

OPSETS = range(18, 24)
LEAST_TORCH = (2, 9)
# How attention is written: in ONNX's own operators, or as one that onnxruntime takes from a library.
OPS = ('standard', 'native')
# The example size for tracing; height and width must differ, or they become one dimension.
EXAMPLE = (2, 3, 192, 256)


def export_onnx(
    detector: nn.Module,
    path: Union[str, Path],
    nms: bool = False,
    opset: int = 18,
    op: str = 'standard',
) -> None:
    """Write a detector as an ONNX file, for batches and images of any size.

    Args:
        detector: A one-stage detector, see :class:`~sasa_det.export.decoded.DecodedDetector`.
        path: The file to write.
        nms: Whether the model includes NMS.
        opset: Version of ONNX's operators.
        op: How attention is written. 'standard': in ONNX's operators, for any runtime. 'native': as one
            node, for onnxruntime with the library of :func:`sasa_det.export.native_op_library`.

    Raises:
        ImportError: A package is missing; names the extra that installs it.
        ValueError: The detector, the opset or the op cannot be exported.
        OSError: The file cannot be written.

    Examples:
        >>> export_onnx(load_detector(config, 'epoch_12.pth'), 'detector.onnx')  # doctest: +SKIP
    """
    check_opset(opset)
    if op not in OPS:
        raise ValueError(f'op must be one of {OPS}, but is {op!r}')
    check_writable(path)
    onnx = import_onnx()
    model = (Candidates if nms else DecodedDetector)(detector).eval()
    outputs = ['boxes', 'scores', 'labels'] if nms else ['boxes', 'scores']
    proto = translate(export_program(model), ['images'], outputs, opset, op)
    if nms:
        from .suppression import suppress

        cfg = detector.test_cfg
        suppress(proto.graph, cfg.nms, cfg.max_per_img)
    _name_dimensions(proto.graph, nms)
    meta = dict(
        detector=type(detector).__name__,
        classes=json.dumps((getattr(detector, 'dataset_meta', None) or {}).get('classes', ())),
        sasa_det=__version__,
    )
    onnx.helper.set_model_props(proto, meta)
    proto.producer_name, proto.producer_version = 'sasa_det', __version__
    onnx.checker.check_model(proto)
    Path(path).write_bytes(proto.SerializeToString())


def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """Trace a model by torch.export, with dynamic batch and image sizes.

    Args:
        model: A :class:`~sasa_det.export.decoded.DecodedDetector`, in inference mode.

    Returns:
        The program; it needs this package's operator ``sasa_det::local_attention``.
    """
    device = next(model.parameters()).device
    dims = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.export.export(
            model, (torch.zeros(EXAMPLE, device=device),), dynamic_shapes=(dims,), strict=False
        )


def translate(
    program: torch.export.ExportedProgram,
    inputs: List[str],
    outputs: List[str],
    opset: int,
    op: str = 'standard',
):
    """Convert a program, which may hold the operator, to ONNX's operators.

    Args:
        program: A program from :func:`export_program`. With op 'native' it is rewritten.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opset: Version of ONNX's operators.
        op: See :func:`export_onnx`.

    Returns:
        An ``onnx.ModelProto``.
    """
    if op == 'native':
        from .native_attention import PACKED_ATTENTION, pack, packed_attention

        pack(program)
        table = {PACKED_ATTENTION: packed_attention}
    else:
        from .attention import local_attention

        table = {torch.ops.sasa_det.local_attention.default: local_attention}

    with exporting():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table=table,
            verbose=False,
            # onnxscript would search ten thousand standard nodes for patterns for many minutes. Runtimes
            # fold and fuse by themselves when they load the file.
            optimize=op == 'native',
        )
    proto = written.model_proto
    for node in chain(proto.graph.node, *(function.node for function in proto.functions)):
        node.ClearField('metadata_props')  # stack traces, the largest part of the file
    return proto


def import_onnx():
    """Import onnx after checking that all packages for the export are installed, and that torch can export.

    Raises:
        ImportError: A package is missing; names the extra that installs it. Or torch is too old.
    """
    if torch.__version__ < LEAST_TORCH:
        raise ImportError(
            f'exporting takes torch {".".join(map(str, LEAST_TORCH))} or later, and this is {torch.__version__}'
        )
    try:
        import onnx
        import onnxruntime  # noqa: F401  checks what was written
        import onnxscript  # noqa: F401  torch.onnx writes by it
    except ImportError as error:
        raise ImportError(
            f"{error.name} is missing, which exporting takes: pip install 'sasa_det[export]'"
        ) from error
    return onnx


def check_opset(opset: int) -> None:
    """Raise a ValueError if an opset version is not supported.

    Args:
        opset: The version.

    Examples:
        >>> check_opset(9)
        Traceback (most recent call last):
            ...
        ValueError: opset must be 18 to 23, but is 9
    """
    if opset not in OPSETS:
        raise ValueError(f'opset must be {OPSETS[0]} to {OPSETS[-1]}, but is {opset}')


def check_writable(path: Union[str, Path]) -> None:
    """Raise an OSError if a file cannot be written, before the export starts.

    Args:
        path: The file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path}: is a folder, but a file is to be written')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'{path}: cannot be written, there is no folder {path.parent}')
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f'{path}: cannot be written, there is no permission to')


@contextmanager
def exporting():
    """Silence torch.onnx's message, at every export, about missing torchvision operators."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _name_dimensions(graph, nms: bool) -> None:
    """Give the dynamic sizes of inputs and outputs descriptive names."""
    names = dict(images=('batch', None, 'height', 'width'))
    if nms:
        names.update({name: ('found',) for name in ('boxes', 'scores', 'labels', 'images_of')})
    else:
        names.update(boxes=('batch', 'priors'), scores=('batch', 'priors'))
    for value in (*graph.input, *graph.output):
        for name, dim in zip(names[value.name], value.type.tensor_type.shape.dim):
            if name is not None:
                dim.dim_param = name
