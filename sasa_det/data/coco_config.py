"""How a config for one's own COCO-format data is written.

From the shell: `sasa-det coco-config DATA_ROOT --out my_config.py`
"""

import sys
from pathlib import Path
from typing import List, Optional, Tuple, Union

from mmengine.config import Config

from ..cli.parsers import coco_config as parser
from ..configs import COCO_FORMAT, config_literal, find_config
from .checked_coco import check_classes, check_images, load_annotations
from .entry_problems import check_entries

_TEMPLATE = """\
# {classes_count} classes of {data_root}
# All that is not here is inherited; what is set here wins.
_base_ = {base}

data_root = {data_root}
# In the order of the file's categories: labels are numbered by it.
metainfo = dict(classes={classes})
model = dict(bbox_head=dict(num_classes={classes_count}))

train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file={train_ann},
        data_prefix=dict(img={train_img}),
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file={val_ann},
        data_prefix=dict(img={val_img}),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={val_ann_path})
test_evaluator = val_evaluator
"""


def write_coco_config(
    data_root,
    out,
    *,
    base: str = COCO_FORMAT,
    max_epochs: Optional[int] = None,
    image_scale: Optional[Union[int, Tuple[int, int]]] = None,
    train_ann: str = 'annotations/instances_train.json',
    val_ann: str = 'annotations/instances_val.json',
    train_img: str = 'train/',
    val_img: str = 'val/',
) -> Path:
    """Write a config that trains a detector on COCO-format data, which is checked first.

    Args:
        data_root: The data's folder; the last four arguments are relative to it.
        out: The config to write.
        base: The config to inherit from: one of this package with datasets of type
            CheckedCocoDataset, or your own file.
        max_epochs: Number of epochs, instead of the base's. The base's learning rate schedule is
            stretched to it.
        image_scale: Size in pixels that images are scaled to fit in, instead of the base's: width
            and height, or one number.
        train_ann, val_ann: Annotation files.
        train_img, val_img: Folders of images.

    Returns:
        The config's path.

    Raises:
        FileNotFoundError, ValueError: As for :class:`CheckedCocoDataset`. Also if max_epochs or
            image_scale is out of range, or the base has no place for it.

    Examples:
        >>> write_coco_config('no/such', 'config.py')  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: annotation file .../instances_train.json does not exist; ...
    """
    root = Path(data_root).expanduser().resolve()
    classes = None
    for ann, img in ((train_ann, train_img), (val_ann, val_img)):
        content = load_annotations(root / ann)
        # Names among them: they become part of a config, which is code.
        check_entries(root / ann, content, tested=ann == val_ann)
        if classes is None:
            classes = tuple(category['name'] for category in content['categories'])
        check_classes(root / ann, content, classes)
        check_images(root / ann, content, root / img)

    out = Path(out)
    if '::' not in base:  # mmengine reads it relative to the config
        base = Path(base).resolve().as_posix()
    text = _TEMPLATE.format(
        base=config_literal(base),
        classes=config_literal(classes),
        classes_count=len(classes),
        data_root=config_literal(f'{root.as_posix()}/'),
        train_ann=config_literal(train_ann),
        val_ann=config_literal(val_ann),
        train_img=config_literal(train_img),
        val_img=config_literal(val_img),
        val_ann_path=config_literal((root / val_ann).as_posix()),
    )
    if max_epochs is not None or image_scale is not None:
        inherited = Config.fromstring(f'_base_ = {config_literal(base)}', '.py')
        if max_epochs is not None:
            text += _epochs_lines(inherited, base, max_epochs)
        if image_scale is not None:
            text += _scale_lines(inherited, base, image_scale)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding='utf-8')
    return out


def _copied(steps) -> List[dict]:
    """Copies of inherited dicts, without the scope that mmengine adds to them."""
    return [{key: value for key, value in step.items() if key != '_scope_'} for step in steps]


def _epochs_lines(inherited: Config, base: str, max_epochs: int) -> str:
    """Lines that set the number of epochs and stretch the base's schedule to it."""
    if max_epochs < 1:
        raise ValueError(f'max_epochs must be at least 1, got {max_epochs}')
    before = inherited.get('train_cfg', {}).get('max_epochs')
    if not before:
        raise ValueError(f'max_epochs: the base {base} has no train_cfg.max_epochs to change')
    schedulers = _copied(inherited.get('param_scheduler', []))
    for scheduler in schedulers:
        if scheduler.get('by_epoch', True):
            for key in ('begin', 'end', 'T_max'):
                if key in scheduler:
                    scheduler[key] = round(scheduler[key] * max_epochs / before)
            if 'milestones' in scheduler:
                scheduler['milestones'] = [
                    max(1, round(epoch * max_epochs / before)) for epoch in scheduler['milestones']
                ]
    return (
        f'\n# {before} epochs in the base, whose learning rate schedule is stretched.\n'
        f'train_cfg = dict(max_epochs={max_epochs})\n'
        f'param_scheduler = {config_literal(schedulers)}\n'
    )


def _scale_lines(inherited: Config, base: str, image_scale: Union[int, Tuple[int, int]]) -> str:
    """The base's pipelines, whole, with another scale: a config cannot change a single item of a list."""
    scale = (image_scale,) * 2 if isinstance(image_scale, int) else tuple(image_scale)
    if len(scale) != 2 or min(scale) < 32:
        raise ValueError(
            f'image_scale must be one or two numbers of pixels of at least 32, got {image_scale}'
        )
    lines = '\n# The pipelines of the base at another scale (width, height).\n'
    for name in ('train', 'val', 'test'):
        pipeline = _copied(inherited[f'{name}_dataloader']['dataset']['pipeline'])
        resizes = [step for step in pipeline if 'scale' in step]
        if not resizes:
            raise ValueError(f'image_scale: the base {base} has no scale in its {name} pipeline')
        for step in resizes:
            step['scale'] = scale
        lines += (
            f'{name}_pipeline = {config_literal(pipeline)}\n'
            f"{name}_dataloader['dataset']['pipeline'] = {name}_pipeline\n"
        )
    return lines


def main(argv: Optional[list] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    options = vars(parser().parse_args(argv))
    if options['image_scale'] and len(options['image_scale']) == 1:
        options['image_scale'] *= 2
    try:
        if '::' not in options['base']:
            options['base'] = str(find_config(options['base']))
        out = write_coco_config(**options)
    except (OSError, ValueError) as error:
        print(f'sasa-det coco-config: {error}', file=sys.stderr)
        return 1
    print(f'wrote {out}')
    return 0
