"""What a diagnosis of a detector's attention writes: its numbers as JSON, and a page with pictures."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import cv2
import numpy as np
from matplotlib import colormaps

from ..evaluation.diagnosis import HeadDiagnosis, LayerDiagnosis
from ..evaluation.diagnosis_accuracy import AWAY, Case
from .report_page import render

CELL = 12  # pixels of a picture per position of a window
AS_TRAINED = 'as trained'
TEMPLATE = """{% extends 'layout' %}
{% block content %}
<style>
table.heads td { vertical-align: top; text-align: left; font-size: .8rem; line-height: 1.4;
  white-space: nowrap } table.heads th { text-align: left } table.heads img { margin-bottom: .3rem }
.static { background: #fff6e0; border: 1px solid #d79b00; border-radius: 3px; padding: 0 .3rem }
</style>
{% if accuracy %}
<h2>Accuracy with something taken away</h2>
<p>Taken away from the trained detector, which is not trained anew. So a loss says what this detector uses,
and not what a detector trained without it would reach. Without q.k all keys are zero. Without q.r all
relative positions are. For the same weights at every pixel, the keys are zero and each query is the mean
query.</p>
<div class="wide"><table>
<thead><tr><th scope="col">logits</th><th scope="col">{{ metric }}</th>
<th scope="col">difference</th></tr></thead>
<tbody>
{% for name, value, difference in accuracy %}
<tr><td>{{ name }}</td><td>{{ value }}</td><td>{{ difference }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if per_layer %}
<h2>Taken away from one layer at a time</h2>
<div class="wide"><table>
<caption>Difference of {{ metric }} to the detector as trained. A dash: the layer has no such term.</caption>
<thead><tr><th scope="col">layer</th>
{% for name in away %}<th scope="col">{{ name }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for name, differences in per_layer %}
<tr><td>{{ name }}</td>{% for each in differences %}<td>{{ each }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<h2>Heads</h2>
<p>Each picture is the mean of a head's weights over {{ images }} validation images: brighter cells weigh
more, on one scale per layer. The pixel that asks is outlined. Below it:</p>
<dl class="next">
{% for name, text in explained %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>
<div class="wide"><table class="heads">
<tbody>
{% for layer in layers %}
<tr><th scope="row">{{ layer.name }}<br>{{ layer.window }}</th>
{% for head in layer.heads %}
<td><img src="{{ head.source }}" alt="{{ head.alt }}">head {{ loop.index }}
{% if head.static %}<span class="static">static</span>{% endif %}
{% for line in head.lines %}<br>{{ line }}{% endfor %}
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<h2>Repeat it</h2>
<pre><code>{{ command }}</code></pre>
<p><a href="diagnosis.json">numbers as JSON</a></p>
{% endblock %}
"""
EXPLAINED = {
    'static': (
        'The head never moves: at 99 of 100 pixels, less than 5 % of its weight is not as in the picture.'
    ),
    'dy, dx': (
        'Where the head looks on average: rows down and columns to the right, in pixels of the map.'
    ),
    'entropy': 'Of the weights, divided by log k²: 1 for equal weights, 0 for a single cell.',
    'largest': 'The largest weight of the window around a pixel, on average.',
    'q.k, q.r, fixed': (
        'Shares of the variance of the logits. Fixed is what is the same at every pixel. q.k and q.r are what '
        'they change from pixel to pixel.'
    ),
    'moves': 'Share of the weight of a pixel that is elsewhere than in the picture, on average.',
}


def as_content(
    layers: Mapping[str, LayerDiagnosis],
    measured: Mapping[Case, Mapping[str, float]],
    **about: Any,
) -> Dict[str, Any]:
    """Gather a diagnosis as it is written to JSON.

    Args:
        layers: From :func:`sasa_det.evaluation.diagnosis.diagnose`.
        measured: From :func:`sasa_det.evaluation.diagnosis_accuracy.measure`; may be empty.
        about: What else to write, such as the names of config and checkpoint.

    Returns:
        The content. ``accuracy`` has all numbers of the evaluator, from 0 to 1 where it counts so.
    """
    content = dict(
        about,
        layers={
            name: dict(
                pixels=found.pixels,
                heads=[head._asdict() for head in found.heads],
                mean_weights=np.round(found.weights.tolist(), 6).tolist(),
            )
            for name, found in layers.items()
        },
    )
    if not any(measured.values()):
        nothing = 'The detector finds nothing in the validation data, so its AP is 0 in each case.'
        return {**content, 'notes': [nothing]} if measured else content
    content.update(metric=next(iter(measured[Case()])), accuracy={}, accuracy_per_layer={})
    for case, numbers in measured.items():
        place = content['accuracy']
        if case.layer is not None:
            place = content['accuracy_per_layer'].setdefault(case.layer, {})
        place[AWAY.get(case.away, AS_TRAINED)] = dict(numbers)
    return content


def write_diagnosis(folder: Path, content: Mapping[str, Any], command: str) -> Path:
    """Write diagnosis.json and index.html, which holds its pictures and asks for no other file.

    Args:
        folder: Where to; it is made if need be.
        content: From :func:`as_content`.
        command: The command line that repeats it.

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'diagnosis.json').write_text(json.dumps(content, indent=1) + '\n')
    page = folder / 'index.html'
    page.write_text(_render(content, command), encoding='utf-8')
    return page


def accuracy_rows(content: Mapping[str, Any]) -> List[tuple]:
    """List the accuracy in each case: its name, the number, and the difference to the first.

    Args:
        content: From :func:`as_content`.
    """
    cases = content.get('accuracy', {})
    return [
        (name, _number(content, numbers), '' if name == AS_TRAINED else _loss(content, numbers))
        for name, numbers in cases.items()
    ]


def per_layer_rows(content: Mapping[str, Any]) -> List[tuple]:
    """List what each layer's terms are worth: its name, and the differences in the order of ``AWAY``.

    Args:
        content: From :func:`as_content`.
    """
    return [
        (layer, [_loss(content, cases.get(name)) for name in AWAY.values()])
        for layer, cases in content.get('accuracy_per_layer', {}).items()
    ]


def describe_head(head: HeadDiagnosis) -> Dict[str, str]:
    """Format the numbers of a head, by the names of ``EXPLAINED``.

    Args:
        head: The head.

    Examples:
        >>> head = HeadDiagnosis(0.1, 0.3, 0.9, 1.0, -0.04, 0.02, 0.06, 0.92, 0.05, False)
        >>> describe_head(head)['q.k, q.r, fixed'], describe_head(head)['dy, dx']
        ('2 %, 6 %, 92 %', '+1.0, +0.0')
    """
    shares = (head.share_qk, head.share_qr, head.share_fixed)
    # Zero is added as there is a negative zero, which would be printed.
    dy, dx = (round(each, 1) + 0.0 for each in (head.dy, head.dx))
    return {
        'dy, dx': f'{dy:+.1f}, {dx:+.1f}',
        'entropy': f'{head.entropy:.2f}',
        'largest': f'{head.largest_weight:.2f}',
        'q.k, q.r, fixed': ', '.join(f'{100 * share:.0f} %' for share in shares),
        'moves': f'{100 * head.moved:.1f} %',
    }


def describe_metric(metric: str) -> str:
    """Name a metric as a table's title does.

    Args:
        metric: The evaluator's name of it.

    Examples:
        >>> describe_metric('coco/bbox_mAP'), describe_metric('lvis/bbox_AP')
        ('AP', 'lvis/bbox_AP')
    """
    return 'AP' if metric == 'coco/bbox_mAP' else metric


def draw_mean_map(weights: np.ndarray, largest: float) -> np.ndarray:
    """Draw a head's mean weights; the pixel that asks is outlined.

    Args:
        weights: (k, k).
        largest: The weight of the brightest colour.

    Returns:
        (12 k, 12 k, 3) RGB, uint8.

    Examples:
        >>> picture = draw_mean_map(np.eye(3), 1.0)
        >>> picture.shape, bool(picture[1, 1].sum() > picture[1, 13].sum())
        ((36, 36, 3), True)
    """
    heat = colormaps['inferno'](weights / max(largest, 1e-12), bytes=True)[..., :3]
    picture = np.ascontiguousarray(heat.repeat(CELL, 0).repeat(CELL, 1))
    start = len(weights) // 2 * CELL
    end = start + CELL - 1
    cv2.rectangle(picture, (start, start), (end, end), (0, 255, 255), 1)
    return picture


def _render(content: Mapping[str, Any], command: str) -> str:
    layers = content['layers']
    heads = [HeadDiagnosis(**head) for layer in layers.values() for head in layer['heads']]
    accuracy = accuracy_rows(content)
    metric = describe_metric(content.get('metric', ''))
    static = sum(head.static for head in heads)
    facts = [(f'{metric} {name}', value) for name, value, _ in accuracy]
    facts.append(('static heads', f'{static} of {len(heads)}'))
    return render(
        TEMPLATE,
        title=f'{Path(content["config"]).stem}: what its attention attends to',
        lead=f'Weights of {content["checkpoint"]}, on the validation data of the config.',
        missing=content.get('notes', []),
        facts=facts,
        accuracy=accuracy,
        metric=metric,
        per_layer=per_layer_rows(content),
        away=AWAY.values(),
        images=content['images'],
        explained=EXPLAINED.items(),
        layers=[_picture_layer(name, layer) for name, layer in layers.items()],
        command=command,
    )


def _picture_layer(name: str, layer: Mapping[str, Any]) -> Dict[str, Any]:
    maps = np.asarray(layer['mean_weights'])
    size = maps.shape[-1]
    pictured = []
    for number, (weights, head) in enumerate(zip(maps, layer['heads'], strict=True), 1):
        row, col = (each - size // 2 for each in np.unravel_index(weights.argmax(), weights.shape))
        numbers = describe_head(HeadDiagnosis(**head))
        pictured.append(
            dict(
                source=_as_source(draw_mean_map(weights, maps.max())),
                alt=f'Head {number}: {size} x {size} weights, the largest {weights.max():.2f} at row {row:+d}, '
                f'column {col:+d} from the pixel.',
                lines=[f'{key} {value}' for key, value in numbers.items()],
                static=head['static'],
            )
        )
    return dict(name=name, window=f'window of {size} x {size}', heads=pictured)


def _as_source(picture: np.ndarray) -> str:
    _, encoded = cv2.imencode('.png', picture[..., ::-1])
    return f'data:image/png;base64,{b64encode(encoded.tobytes()).decode()}'


def _number(content: Mapping[str, Any], numbers: Mapping[str, float]) -> str:
    return f'{_scaled(content, numbers):.1f}'


def _loss(content: Mapping[str, Any], numbers: Optional[Mapping[str, float]]) -> str:
    if numbers is None:
        return '–'
    before = content['accuracy'][AS_TRAINED]
    return f'{_scaled(content, numbers) - _scaled(content, before):+.1f}'


def _scaled(content: Mapping[str, Any], numbers: Mapping[str, float]) -> float:
    # mmdet's evaluators count from 0 to 1; tables have per cent.
    return 100 * numbers[content['metric']]
