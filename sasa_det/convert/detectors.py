"""How mmdet's detectors are converted: which layers, by which images, run in which stages."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..export.check import load_images as load_items
from .layers import Choice, choose_layers
from .walk import Stage, watch_calls

PARTS = ('backbone', 'neck', 'head', 'predictors')
DEFAULT_PARTS = ('backbone', 'neck', 'head')
# Regions of each image that a mask head is fitted on.
REGIONS = 16
# The most bytes that the maps of one layer, of all images, are to take.
MEMORY = 4 * 2**30
IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def part_of(name: str, model: nn.Module) -> str:
    """Say to which part of a detector a convolution belongs.

    Args:
        name: The convolution's name.
        model: The detector.

    Returns:
        One of PARTS. In a head, a predictor is a convolution whose outputs are classes, boxes or masks.
    """
    part = name.partition('.')[0]
    if part in ('backbone', 'neck'):
        return part
    from mmcv.cnn import ConvModule

    conv = model.get_submodule(name)
    host = model.get_submodule(name.rpartition('.')[0])
    is_predictor = conv.in_channels != conv.out_channels and not isinstance(host, ConvModule)
    return 'predictors' if is_predictor else 'head'


def choose_detectors_layers(
    model: nn.Module,
    parts: Sequence[str] = DEFAULT_PARTS,
    num_heads: int = 8,
    kernel_size: int = 5,
    static: bool = False,
    expansion: int = 1,
) -> Dict[str, Choice]:
    """Decide for each spatial convolution of a detector whether it becomes attention.

    Args:
        model: The detector.
        parts: Of PARTS, those to convert.
        num_heads: Heads of each attention.
        kernel_size: Window size of each attention.
        static: See :func:`sasa_det.convert.layers.choose_layers`.
        expansion: The same.

    Returns:
        What becomes of each spatial convolution, by its name.

    Raises:
        ValueError: There is no such part, or an argument is out of its range.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f'parts may hold {", ".join(PARTS)}, but has {part!r}')
    choices = choose_layers(model, num_heads, kernel_size, static=static, expansion=expansion)
    for name, choice in choices.items():
        part = part_of(name, model)
        if choice.attn_cfg is None:
            continue
        if part not in parts:
            choices[name] = Choice(None, f'the part {part} was not asked for')
        elif hasattr(model.get_submodule(name.rpartition('.')[0]), 'deform_groups'):
            choices[name] = Choice(None, 'it computes the offsets of a deformable convolution')
        elif part == 'backbone' and 'stem' in name:
            choices[name] = Choice(None, 'it belongs to the stem, which reads the image')
    return choices


def stages_of(model: nn.Module) -> List[Stage]:
    """List what runs a detector's convolutions, such that heads run again without the backbone.

    Args:
        model: A detector of mmdet, of one or two stages, or with a transformer as its head.
    """
    stages = [lambda model, images: model.extract_feat(images)]
    if _has_convolutions(model, 'rpn_head'):
        stages.append(_run_rpn)
        if getattr(model.roi_head, 'with_mask', False):
            stages.append(_run_mask_head)
    elif _has_convolutions(model, 'bbox_head'):
        stages.append(lambda model, features: model.bbox_head(features))
    return stages


def _has_convolutions(model: nn.Module, head: str) -> bool:
    head = getattr(model, head, None)
    return head is not None and any(isinstance(each, nn.Conv2d) for each in head.modules())


def _run_rpn(model: nn.Module, features: Sequence[Tensor]) -> tuple:
    return features, model.rpn_head(features)


def _run_mask_head(model: nn.Module, state: tuple) -> tuple:
    # Both halves of a batch look at the regions that the teacher proposes.
    features, outputs = state
    stride = model.rpn_head.prior_generator.strides[0][0]
    size = tuple(edge * stride for edge in features[0].shape[2:])
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=size)
    batch = len(features[0])
    metas = [meta] * max(1, batch // 2)
    proposals = model.rpn_head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=False)
    first = [each.bboxes[:REGIONS] for each in proposals]
    # As many of each image, so that the halves of the regions are those of the images.
    count = max(1, min(map(len, first)))
    first = [each[:count] for each in first]
    regions = bbox2roi(first * (batch // len(first)))
    roi_head = model.roi_head
    if isinstance(roi_head.mask_head, nn.ModuleList):
        calls = [(number,) for number in range(len(roi_head.mask_head))]  # of a cascade
    else:
        calls = [()]
    masks = [roi_head._mask_forward(*call, features, regions)['mask_preds'] for call in calls]
    return features, outputs, masks


def find_images(config: Config, folder=None) -> List[str]:
    """List image files to convert with.

    Args:
        config: The detector's config.
        folder: Their folder, with any subfolders; None for the config's training images.

    Returns:
        Their paths.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
        ValueError: The config names no training data.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f'{folder}: no such folder of images')
        found = sorted(
            str(path) for path in Path(folder).rglob('*') if path.suffix.lower() in IMAGE_ENDINGS
        )
        if not found:
            raise FileNotFoundError(
                f'{folder}: there is no image ({", ".join(IMAGE_ENDINGS)}) in it'
            )
        return found
    if not config.get('train_dataloader'):
        raise ValueError(
            f'{config.filename}: train_dataloader is not set; name a folder of images by --images'
        )
    init_default_scope(config.get('default_scope', 'mmdet'))
    with redirect_stdout(io.StringIO()):  # pycocotools tells of its index
        built = [
            DATASETS.build({**dataset, 'pipeline': []})
            for dataset in _wrapped(config.train_dataloader.dataset)
        ]
    return [
        dataset.get_data_info(index)['img_path']
        for dataset in built
        for index in range(len(dataset))
    ]


def _wrapped(dataset: Mapping) -> List[Mapping]:
    """List the data sets that others wrap or join."""
    inner = [dataset['dataset']] if 'dataset' in dataset else dataset.get('datasets')
    return [leaf for each in inner for leaf in _wrapped(each)] if inner else [dataset]


def load_images(
    model: nn.Module, config: Config, files: Sequence[str], count: int, seed: int = 0
) -> Tensor:
    """Load images at random, without labels, as the config's test pipeline does.

    Args:
        model: The detector, whose data_preprocessor normalises them.
        config: Its config.
        files: What :func:`find_images` found.
        count: Number of images; fewer if their maps would take more than MEMORY bytes.
        seed: Of the choice.

    Returns:
        (B, 3, H, W).

    Raises:
        ValueError: There are fewer than two images, one cannot be read, or the detector cannot be run;
            names it.
    """
    if len(files) < 2 or count < 2:
        raise ValueError(
            f'a conversion needs at least two images, but there are {len(files)} and {count} are asked for'
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    items = load_items(config, [files[index] for index in order[:count]])
    # A batch has the largest height and width of its images.
    sizes = torch.tensor([item['inputs'].shape for item in items])
    padding = sizes.amax(0).prod().item() / sizes[0].prod().item()
    limit = int(MEMORY / (padding * bytes_per_image(model, _batch(model, items[:1]))))
    return _batch(model, items[: max(2, limit)])


def _batch(model: nn.Module, items: Sequence[dict]) -> Tensor:
    data = {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}
    return model.data_preprocessor(data, False)['inputs']


def bytes_per_image(model: nn.Module, image: Tensor) -> int:
    """Estimate the memory that one image takes in a conversion, at the largest layer.

    Args:
        model: The detector.
        image: (1, 3, H, W).

    Raises:
        ValueError: The detector cannot be run; says why.
    """
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Conv2d)]
    try:
        calls = watch_calls(model, names, stages_of(model), image)
    except Exception as error:  # a detector is a program, which may raise any error
        raise ValueError(
            f'{type(model).__name__} cannot be converted: its backbone, neck and head cannot be run by '
            f'themselves ({type(error).__name__}: {str(error).partition(chr(10))[0]})'
        ) from error
    largest = max(
        (read.numel() + made.numel() for each in calls.values() for read, made in each),
        default=image.numel(),
    )
    # A teacher's and a student's half, each with an input, an output, and what follows in place or not.
    return 2 * 3 * image.element_size() * largest
