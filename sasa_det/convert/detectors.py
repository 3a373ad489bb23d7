"""How mmdet's detectors are converted: which layers, by which images, run in which stages."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from .layers import Choice, choose_layers
from .walk import Stage

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
) -> Dict[str, Choice]:
    """Decide for each spatial convolution of a detector whether it becomes attention.

    Args:
        model: The detector.
        parts: Of PARTS, those to convert.
        num_heads: Heads of each attention.
        kernel_size: Window size of each attention.

    Returns:
        What becomes of each spatial convolution, by its name.

    Raises:
        ValueError: There is no such part, or an argument is out of its range.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f'parts may hold {PARTS}, but has {part!r}')
    choices = choose_layers(model, num_heads, kernel_size)
    for name, choice in choices.items():
        part = part_of(name, model)
        if choice.attn_cfg is None:
            continue
        if part not in parts:
            choices[name] = Choice(None, f'the part {part} was not asked for')
        elif part == 'backbone' and 'stem' in name:
            choices[name] = Choice(None, 'it belongs to the stem, which reads the image')
    return choices


def stages_of(model: nn.Module) -> List[Stage]:
    """List what runs a detector's convolutions, such that heads run again without the backbone.

    Args:
        model: A detector of mmdet, of one or two stages, or with a transformer as its head.
    """
    stages = [lambda model, images: model.extract_feat(images)]
    if getattr(model, 'rpn_head', None) is not None:
        stages.append(_run_rpn)
        if getattr(model.roi_head, 'with_mask', False):
            stages.append(_run_mask_head)
    elif any(isinstance(module, nn.Conv2d) for module in model.bbox_head.modules()):
        stages.append(lambda model, features: model.bbox_head(features))
    return stages


def _run_rpn(model: nn.Module, features: Sequence[Tensor]) -> Sequence[Tensor]:
    model.rpn_head(features)
    return features


def _run_mask_head(model: nn.Module, features: Sequence[Tensor]) -> Tensor:
    # Both halves of a batch look at the regions that the teacher proposes.
    stride = model.rpn_head.prior_generator.strides[0][0]
    size = tuple(edge * stride for edge in features[0].shape[2:])
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=size
        )
    )
    batch = len(features[0])
    proposals = model.rpn_head.predict(features, [sample] * batch, rescale=False)
    first = [each.bboxes[:REGIONS] for each in proposals[: max(1, batch // 2)]]
    # As many of each image, so that the halves of the regions are those of the images.
    count = max(1, min(map(len, first)))
    first = [each[:count] for each in first]
    regions = bbox2roi(first * (batch // len(first)))
    return model.roi_head._mask_forward(features, regions)['mask_preds']


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
    dataset = config.train_dataloader.dataset.copy()
    while 'dataset' in dataset:  # one that wraps another
        dataset = dataset.dataset.copy()
    dataset.update(pipeline=[])
    with redirect_stdout(io.StringIO()):  # pycocotools tells of its index
        built = DATASETS.build(dataset)
    return [built.get_data_info(index)['img_path'] for index in range(len(built))]


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
        ValueError: There are fewer than two images.
        OSError: One cannot be read; names it.
    """
    if len(files) < 2 or count < 2:
        raise ValueError(
            f'a conversion needs at least two images, but there are {len(files)} and {count} are asked for'
        )
    pipeline = Compose(
        [
            step
            for step in config.test_dataloader.dataset.pipeline
            if 'LoadAnnotations' not in step['type']
        ]
    )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    items = [_load(pipeline, files[order[0]])]
    batch = dict(inputs=[items[0]['inputs']], data_samples=[items[0]['data_samples']])
    limit = MEMORY // bytes_per_image(model, model.data_preprocessor(batch, False)['inputs'])
    count = max(2, min(count, len(files), limit))
    items += [_load(pipeline, files[index]) for index in order[1:count]]
    batch = dict(
        inputs=[item['inputs'] for item in items],
        data_samples=[item['data_samples'] for item in items],
    )
    return model.data_preprocessor(batch, False)['inputs']


def bytes_per_image(model: nn.Module, image: Tensor) -> int:
    """Estimate the memory that one image takes in a conversion, at the largest layer.

    Args:
        model: The detector.
        image: (1, 3, H, W).
    """
    largest = [image.numel()]
    hooks = [
        module.register_forward_hook(
            lambda module, args, output: largest.append(args[0].numel() + output.numel())
        )
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            state = image
            for stage in stages_of(model):
                state = stage(model, state)
    finally:
        for hook in hooks:
            hook.remove()
    # A teacher's and a student's half, each with an input, an output, and what follows in place or not.
    return 2 * 3 * image.element_size() * max(largest)


def _load(pipeline: Compose, file: str) -> dict:
    try:
        item = pipeline(dict(img_path=file, img_id=0, height=None, width=None))
    except Exception as error:  # a decoder may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f'{file}: cannot be read as an image ({reason})') from error
    if item is None:
        raise OSError(f'{file}: cannot be read as an image')
    return item
