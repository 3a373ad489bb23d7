"""The operator in onnxruntime: a library of the C++ kernels, and files of one node per attention."""

import io
import os
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_detectors import save
from torch import nn

onnx = pytest.importorskip('onnx', reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip('onnxruntime', reason="the extra 'export' is not installed")

from onnx import TensorProto, helper  # noqa: E402

from sasa_det.cli.main import main  # noqa: E402
from sasa_det.export import native_op_library, onnx_library  # noqa: E402
from sasa_det.export.check import open_session  # noqa: E402
from sasa_det.export.to_onnx import EXAMPLE, export_onnx, export_program, translate  # noqa: E402
from sasa_det.layers.local_self_attention import LocalSelfAttention2d  # noqa: E402
from sasa_det.ops import local_attention  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = dict(kernel_size=5, num_heads=2, dilation=1, border='zeros', scale=0.5)


def open_node(threads=1, tables=True, query=False, **attributes):
    """Open a file of one node, whose inputs are the graph's."""
    inputs = [
        'maps',
        *(['rel_row', 'rel_col'] if tables else ['', '']),
        *(['query'] if query else []),
    ]
    node = helper.make_node(
        'LocalAttention', inputs, ['output'], domain='sasa_det', **{**OPTIONS, **attributes}
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in [*inputs, 'output']
        if name
    ]
    graph = helper.make_graph([node], 'one_node', values[:-1], values[-1:])
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid('sasa_det', 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(native_op_library())
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )


@pytest.mark.parametrize('dilation', [1, 2, 100])
@pytest.mark.parametrize('border', ['zeros', 'mask'])
@pytest.mark.parametrize('logits', ['qk+qr', 'qk', 'qr'])
def test_a_node_computes_the_bits_of_the_operator_in_torch(dilation, border, logits):
    generator = torch.Generator().manual_seed(dilation)
    options = {**OPTIONS, 'dilation': dilation, 'border': border}
    parts = 3 if 'qk' in logits else 2
    # More blocks of rows than heads, so that several threads cut the map.
    maps = torch.randn(2, parts * 12, 70, 19, generator=generator)
    query, *key, value = maps.chunk(parts, 1)
    tables = [torch.randn(2, 3, 5, generator=generator) for _ in range(2)]
    if 'qr' not in logits:
        tables = [None, None]
    key = key[0] if key else None
    expected = local_attention(query, key, value, *tables, **options, backend='native').numpy()
    names = dict(maps=maps, rel_row=tables[0], rel_col=tables[1])
    inputs = {name: each.numpy() for name, each in names.items() if each is not None}
    for threads in (1, 3):
        node = open_node(threads, 'qr' in logits, has_key=parts == 3, **options)
        (found,) = node.run(None, inputs)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize('stride, dilation', [(2, 1), (2, 3), (3, 1), (8, 2), (100, 1)])
@pytest.mark.parametrize('border', ['zeros', 'mask'])
@pytest.mark.parametrize('logits', ['qk+qr', 'qk', 'qr'])
def test_a_node_with_a_stride_computes_the_bits_of_the_operator(stride, dilation, border, logits):
    generator = torch.Generator().manual_seed(stride)
    options = {**OPTIONS, 'dilation': dilation, 'border': border, 'stride': stride}
    maps = torch.randn(2, (2 if 'qk' in logits else 1) * 12, 90, 19, generator=generator)
    query = torch.randn(2, 12, -(-90 // stride), -(-19 // stride), generator=generator)
    *key, value = maps.split(12, 1)
    rows = [torch.randn(2, 3, 5, generator=generator) for _ in range(2)]
    if 'qr' not in logits:
        rows = [None, None]
    key = key[0] if key else None
    inputs = dict(maps=maps, query=query, rel_row=rows[0], rel_col=rows[1])
    inputs = {name: each.numpy() for name, each in inputs.items() if each is not None}
    node = dict(tables='qr' in logits, query=True, has_key='qk' in logits, **options)
    if stride > 8:
        with pytest.raises(Exception, match='stride must be from 1 to 8, but is 100'):
            open_node(1, **node)
        return
    expected = local_attention(query, key, value, *rows, **options, backend='native').numpy()
    for threads in (1, 3):
        (found,) = open_node(threads, **node).run(None, inputs)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize('shape', [(0, 12, 4, 5), (1, 12, 0, 5), (1, 12, 4, 0)])
def test_a_node_takes_empty_maps(shape):
    inputs = dict(maps=np.zeros(shape, np.float32), **tables((1, 1, 5)))
    (found,) = open_node(has_key=1).run(None, inputs)
    assert found.shape == (shape[0], 4, *shape[2:])


def tables(rel_row, rel_col=None):
    """Tables of these sizes; as in rel_row where rel_col is None."""
    sizes = dict(rel_row=rel_row, rel_col=rel_row if rel_col is None else rel_col)
    return {name: np.zeros(size, np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize(
    'attributes, message',
    [
        (dict(kernel_size=4), 'kernel_size must be odd, from 1 to 127, but is 4'),
        (dict(kernel_size=129), 'kernel_size must be odd, from 1 to 127, but is 129'),
        (dict(num_heads=0), 'num_heads must be at least 1, but is 0'),
        (dict(dilation=0), 'dilation must be at least 1, but is 0'),
        (dict(border='wrap'), "border must be 'zeros' or 'mask', but is 'wrap'"),
        (dict(border='zeros' * 20), "border must be 'zeros' or 'mask', but is"),
        (dict(scale=float('inf')), 'scale must be a finite number, but is inf'),
    ],
)
def test_a_node_refuses_wrong_attributes(attributes, message):
    with pytest.raises(Exception, match=f'LocalAttention: {message}'):
        open_node(has_key=1, **attributes)


@pytest.mark.parametrize(
    'maps, sizes, attributes, message',
    [
        ((1, 12, 4), [(1, 1, 5)], {}, r'its maps must be \(B, C, H, W\), but are \(1, 12, 4\)'),
        ((1, 14, 4, 4), [(1, 1, 5)], {}, 'must be divisible by 3 parts and num_heads=2, but'),
        ((1, 12, 4, 4), [(1, 1, 5)], dict(num_heads=2**62), 'divisible by 3 parts and num_heads='),
        ((1, 0, 4, 4), [(1, 1, 5)], {}, 'must be divisible by 3 parts'),
        ((1, 12, 4, 4), [(1, 1, 3)], {}, r'must be \(1 or 2, 1, 5\) .* are \(1, 1, 3\)'),
        ((1, 12, 4, 4), [(1, 1, 5), (1, 1, 3)], {}, r'\(1, 1, 5\) and \(1, 1, 3\)'),
        ((1, 12, 4, 4), [(3, 1, 5)], {}, r'must be \(1 or 2, 1, 5\)'),
        ((1, 6, 4, 4), [(1, 0, 5)], {}, 'for 1 channels of a head, an even number'),
        ((1, 8, 4, 4), None, dict(has_key=0), 'without keys it needs rel_row and rel_col'),
    ],
)
def test_a_node_refuses_wrong_inputs(maps, sizes, attributes, message):
    node = open_node(tables=sizes is not None, **{'has_key': 1, **attributes})
    inputs = dict(maps=np.zeros(maps, np.float32), **(tables(*sizes) if sizes else {}))
    with pytest.raises(Exception, match=f'INVALID_ARGUMENT .*LocalAttention: .*{message}'):
        node.run(None, inputs)


@pytest.mark.parametrize(
    'query, message',
    [
        (None, 'with a stride it needs queries of their own'),
        ((1, 6, 3, 3), r'its queries must be \(1, 6, 2, 3\), but are \(1, 6, 3, 3\)'),
        ((1, 12, 2, 3), r'but are \(1, 12, 2, 3\)'),
    ],
)
def test_a_node_refuses_queries_that_a_stride_does_not_leave(query, message):
    node = open_node(tables=False, query=query is not None, has_key=1, stride=2)
    inputs = dict(maps=np.zeros((1, 12, 4, 5), np.float32))
    if query is not None:
        inputs['query'] = np.zeros(query, np.float32)
    with pytest.raises(Exception, match=f'LocalAttention: .*{message}'):
        node.run(None, inputs)


def check_two_sizes(model, layers, path, size):
    """Run a written model at the size that it was traced with and at another one, beside the layers."""
    onnx.save(model, path)
    session = open_session(path, threads=1)
    for each in (EXAMPLE, size):
        x = torch.randn(each, generator=torch.Generator().manual_seed(1))
        (found,) = session.run(None, dict(images=x.numpy()))
        with torch.no_grad():
            expected = layers(x)
        assert found.shape == tuple(expected.shape)
        assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()


class Strided(nn.Module):
    """Layers whose queries are at the pixels that a stride leaves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = dict(kernel_size=3, num_heads=2, downsample='query')
        self.plain = LocalSelfAttention2d(3, 8, bias=True, out_proj=True, stride=2, **options)
        self.only_positions = LocalSelfAttention2d(8, 8, logits='qr', stride=3, **options)
        self.constant = LocalSelfAttention2d(
            8, 12, border='mask', stride=2, constant_query=True, **options
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.constant(self.only_positions(self.plain(x)))


def test_an_attention_with_a_stride_is_one_node(tmp_path):
    layers = Strided().eval()
    model = translate(export_program(layers), ['images'], ['output'], 18, 'native')
    nodes = [node for node in model.graph.node if node.op_type == 'LocalAttention']
    strides = [[each.i for each in node.attribute if each.name == 'stride'] for node in nodes]
    assert strides == [[2], [3], [2]] and all(len(node.input) == 4 for node in nodes)
    check_two_sizes(model, layers, tmp_path / 'layers.onnx', (1, 3, 19, 43))


@pytest.mark.parametrize('op', ['native', 'standard'])
@pytest.mark.parametrize('options', [dict(logits='qr'), dict(border='mask')], ids=str)
def test_a_constant_query_leaves_the_size_open(tmp_path, op, options):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(3, 8, kernel_size=3, num_heads=2, constant_query=True, **options)
    model = translate(export_program(layer.eval()), ['images'], ['output'], 18, op)
    check_two_sizes(model, layer, tmp_path / 'layer.onnx', (1, 3, 19, 43))


class Layers(nn.Module):
    """Layers with every kind of projection that the export meets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        window = dict(kernel_size=3, num_heads=2)
        self.plain = LocalSelfAttention2d(3, 8, bias=True, out_proj=True, stride=2, **window)
        self.unbiased = LocalSelfAttention2d(8, 8, logits='qr', **window)
        # Called for its hook, so that queries, keys and values are maps of their own.
        self.hooked = LocalSelfAttention2d(8, 12, bias=True, border='mask', **window)
        self.hooked.key.register_forward_hook(lambda *_: None)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.hooked(self.unbiased(self.plain(x)))


def test_each_attention_is_one_node_behind_one_convolution(tmp_path):
    layers = Layers().eval()
    model = translate(export_program(layers), ['images'], ['output'], 18, 'native')
    kinds = [node.op_type for node in model.graph.node if node.op_type != 'Constant']
    assert kinds[:6] == ['Conv', 'LocalAttention', 'Conv', 'AveragePool', 'Conv', 'LocalAttention']
    # Of the hooked layer, maps are concatenated.
    assert kinds[-2:] == ['Concat', 'LocalAttention']
    assert kinds.count('LocalAttention') == 3 and not {'Split', 'Expand'} & set(kinds)
    check_two_sizes(model, layers, tmp_path / 'layers.onnx', (1, 3, 9, 23))


@pytest.fixture(scope='module')
def written(detector, tmp_path_factory):
    """What the command writes into a folder, and what it prints."""
    folder = tmp_path_factory.mktemp('native')
    picture = folder / 'a.png'
    cv2.imwrite(
        str(picture), np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    )
    command = ['export', str(folder / 'small.py'), str(save(detector, folder)), '--to', 'onnx']
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*command, '--op', 'native', '--nms', '--check', str(picture)]) == 0
    return folder / 'epoch_1.onnx', printed.getvalue()


@pytest.fixture(scope='module')
def exported(written):
    return written[0]


def test_the_command_compares_and_names_the_library(written):
    assert 'boxes in 1 images: apart from PyTorch by' in written[1]
    assert f'it needs the library {native_op_library()}, registered in the session' in written[1]


def test_a_detector_has_few_nodes(detector, exported):
    model = onnx.load(exported)
    assert len(model.graph.node) < 500
    assert {each.domain for each in model.opset_import} == {'', 'sasa_det'}
    attention = [node for node in model.graph.node if node.op_type == 'LocalAttention']
    layers = [each for each in detector.modules() if isinstance(each, LocalSelfAttention2d)]
    # The head runs on three levels, the backbone's layers once.
    in_head = [each for each in detector.bbox_head.modules() if each in layers]
    assert in_head and len(attention) == len(layers) + 2 * len(in_head)


def test_without_the_library_onnxruntime_names_the_operator(exported):
    with pytest.raises(Exception, match='sasa_det:LocalAttention'):
        onnxruntime.InferenceSession(exported, providers=['CPUExecutionProvider'])


def test_a_library_that_is_not_built_is_said_so(monkeypatch, detector, tmp_path, capsys):
    monkeypatch.setattr(onnx_library, '_FILE', tmp_path / 'libsasa_det_onnx.so')
    with pytest.raises(FileNotFoundError, match='is not built: .*pip install.*--op standard'):
        native_op_library()
    checkpoint = save(detector, tmp_path)
    command = [
        'export',
        str(tmp_path / 'small.py'),
        str(checkpoint),
        '--to',
        'onnx',
        '--op',
        'native',
    ]
    assert main(command) == 2
    assert 'the operator library for onnxruntime is not built' in capsys.readouterr().err
    assert not checkpoint.with_suffix('.onnx').exists()


def test_the_kind_of_operator_is_checked(detector, tmp_path):
    with pytest.raises(
        ValueError, match=r"op must be one of \('standard', 'native'\), but is 'fast'"
    ):
        export_onnx(detector, tmp_path / 'a.onnx', op='fast')


def test_the_cpp_example_prints_what_python_finds(exported, tmp_path):
    """It is compiled against onnxruntime's own library, and our part of its header."""
    (library,) = (Path(onnxruntime.__file__).parent / 'capi').glob('libonnxruntime.so.1.*')
    # The wheel lacks the name that programs look for.
    (tmp_path / 'libonnxruntime.so.1').symlink_to(library)
    program = tmp_path / 'detect'
    compile_it = [
        'g++', '-std=c++17', '-Wall', '-Wextra', '-Werror', str(ROOT / 'examples' / 'detect.cpp'),
        '-I', str(ROOT / 'sasa_det' / 'export' / 'csrc'), '-o', str(program),
        '-L', str(tmp_path), '-l:libonnxruntime.so.1', f'-Wl,-rpath,{tmp_path}',
    ]  # fmt: skip
    subprocess.run(compile_it, check=True)
    picture = np.random.default_rng(0).integers(0, 256, (67, 93, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'picture.ppm'), picture)

    def detect(path):
        command = [program, exported, native_op_library(), path]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = detect(tmp_path / 'picture.ppm')
    assert done.returncode == 0, done.stderr
    printed = np.array([line.split() for line in done.stdout.splitlines()], dtype=np.float64)
    pixels = picture.transpose(2, 0, 1)[None].astype(np.float32)
    boxes, scores, labels, _ = open_session(exported).run(None, dict(images=pixels))
    assert len(boxes) > 5
    assert np.abs(printed - np.column_stack([labels, scores, boxes])).max() < 0.02
    (tmp_path / 'no_picture.ppm').write_text('P3 1 1 255 0 0 0')
    done = detect(tmp_path / 'no_picture.ppm')
    assert done.returncode == 2 and 'no_picture.ppm is no binary PPM' in done.stderr
