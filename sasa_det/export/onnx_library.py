"""Where the shared library is that gives onnxruntime this package's operator."""

from pathlib import Path

_FILE = Path(__file__).with_name('libsasa_det_onnx.so')


def native_op_library() -> str:
    """Return the path of the library that holds the operator ``sasa_det::LocalAttention``.

    A session of onnxruntime runs files of ``sasa-det export --op native`` once the library is registered. The
    library needs neither Python nor torch, and may be copied to another machine of the same kind.

    Returns:
        The path, as ``SessionOptions.register_custom_ops_library`` takes it.

    Raises:
        FileNotFoundError: The library is not built; says how to build it.

    Examples:
        >>> from pathlib import Path
        >>> from sasa_det.export import native_op_library
        >>> Path(native_op_library()).name
        'libsasa_det_onnx.so'
    """
    if not _FILE.exists():
        raise FileNotFoundError(
            f'the operator library for onnxruntime is not built: {_FILE} is missing; '
            '`pip install --no-deps --no-build-isolation path/to/sasa_det` builds it with g++, and '
            '`sasa-det export --op standard` writes files that do not need it'
        )
    return str(_FILE)
