"""How the report of a conversion becomes an HTML page."""

import io
from base64 import b64encode
from typing import Any, Mapping, Optional

from matplotlib.figure import Figure

from .report_page import render

TEMPLATE = """{% extends 'layout' %}
{% block content %}
{% if picture %}
<h2>Which layers are worth it</h2>
<figure>
<img src="{{ picture }}" alt="Errors against what is left of time or FLOPs: a curve of the best sets of
layers, the chosen set, and all layers of some parts.">
<figcaption>Each layer was first converted by itself. A set's error is the sum of its layers' errors at the
outputs, as shares of their variance. Left is less time or fewer FLOPs, down is less error.</figcaption>
</figure>
{% endif %}
<h2>Layers</h2>
<div class="wide"><table>
<caption>Unexplained: the share of the variance of the convolution's output that is left on images held out.
Free: the share that a 3x3 convolution of any weights would leave. Costs are for one image, before → after. A
multiply-add counts as two. What follows the head is left out.</caption>
<thead><tr>{% for name in ('layer', 'unexplained', 'free', 'M parameters', 'GFLOPs', 'ms') -%}
<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in layers %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% if kept %}
<h2>What stays a convolution</h2>
<div class="wide"><table>
<thead><tr><th scope="col">layer</th><th scope="col">why</th></tr></thead>
<tbody>
{% for name, reason in kept.items() %}<tr><td>{{ name }}</td><td>{{ reason }}</td></tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
<h2>Repeat it</h2>
<pre><code>{{ command }}</code></pre>
<h2>Go on</h2>
<dl class="next">
{% for what, step in next_steps %}<dt>{{ what }}</dt><dd><code>{{ step }}</code></dd>
{% endfor %}</dl>
<p><a href="report.json">numbers as JSON</a></p>
{% endblock %}
"""


def render_conversion(*, notes: Any, figure: Optional[Figure] = None, **content: Any) -> str:
    """Render the page of a conversion; it needs no other file.

    Args:
        notes: Lines that say what is missing.
        figure: What :func:`draw_tradeoff` drew, if there is a budget.
        **content: The texts title, lead and command; facts and next_steps, pairs of texts; layers, rows of six
            texts; and kept, from a layer's name to why it stays.

    Returns:
        HTML; all text is escaped.

    Examples:
        >>> page = render_conversion(title='a < b', lead='', notes=[], facts=[], layers=[], kept={},
        ...                          command='', next_steps=[])
        >>> '<h1>a &lt; b</h1>' in page
        True
    """
    picture = None
    if figure is not None:
        file = io.BytesIO()
        figure.savefig(file, format='png', dpi=110)
        picture = f'data:image/png;base64,{b64encode(file.getvalue()).decode()}'
    return render(TEMPLATE, missing=notes, picture=picture, **content)


def draw_tradeoff(tradeoff: Mapping) -> Figure:
    """Plot errors, and AP where it was measured, against what is left of time or FLOPs.

    Args:
        tradeoff: The fields of :class:`sasa_det.convert.report.Tradeoff`.

    Examples:
        >>> figure = draw_tradeoff(dict(kind='time', wanted=0.8, curve=[(1.0, 0.0), (0.7, 0.3)], measured=[],
        ...                             mixes={'all': (0.8, 0.5), 'chosen': (0.8, 0.2)}))
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['best sets of layers', 'all', 'chosen']
    """
    measured = sorted(tradeoff['measured'])
    figure = Figure(figsize=(6 + 5 * bool(measured), 4.2), layout='constrained')
    panels = figure.subplots(ncols=1 + bool(measured), squeeze=False)[0]
    axes = panels[0]
    axes.plot(*zip(*tradeoff['curve']), marker='.', label='best sets of layers')
    for (label, point), marker in zip(tradeoff['mixes'].items(), 'sD^vPXo'):
        chosen = label == 'chosen'
        axes.plot(
            *point, label=label, linestyle='', marker='*' if chosen else marker,
            markersize=14 if chosen else 7,
        )  # fmt: skip
    axes.set_ylabel("sum of the layers' errors at the outputs")
    if measured:
        panels[1].plot(*zip(*measured), marker='o', linestyle='')
        panels[1].axhline(tradeoff['wanted'], color='0.6', linewidth=1)
        panels[1].set_ylabel('change of AP, measured')
    else:
        axes.axvline(tradeoff['wanted'], color='0.6', linewidth=1)
    kind = 'FLOPs' if tradeoff['kind'] == 'flops' else 'time'
    for panel in panels:
        panel.set_xlabel(f'{kind}, of the convolutional detector')
        panel.ticklabel_format(useOffset=False)
        panel.grid(alpha=0.3)
    axes.legend(fontsize='small')
    return figure
