"""How a report becomes an HTML page."""

from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

LAYOUT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1c2430; --soft: #566173; --line: #d9dee6; --accent: #1f5fa8 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line) }
p { max-width: 46rem }
.lead, figcaption, .note { color: var(--soft) }
a { color: var(--accent) }
dl.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.2rem 0 }
dl.facts dt { font-size: .85rem; color: var(--soft) }
dl.facts dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
figure { margin: 1rem 0 0 }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line);
  border-radius: 4px }
figcaption { max-width: 46rem; margin-top: .6rem }
dl.next dt { color: var(--soft) } dl.next dd { margin: 0 0 .7rem; overflow-wrap: anywhere }
pre { overflow-x: auto; padding: .9rem 1rem; background: #f4f6f9; border-radius: 4px;
  font-size: .85rem }
ul.missing { background: #fff6e0; border-left: 4px solid #d79b00; margin: 1.4rem 0;
  padding: .7rem 1rem .7rem 2rem; overflow-wrap: anywhere }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% if missing %}
<ul class="missing" aria-label="Left out of this report">
{% for line in missing %}<li>{{ line }}</li>
{% endfor %}</ul>
{% endif %}
<dl class="facts">
{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% block content %}{% endblock %}
</main>
</body>
</html>
"""

REPORT = """{% extends 'layout' %}
{% block content %}
{% if numbers %}
<h2>Accuracy</h2>
<div class="wide"><table>
<caption>The 12 COCO numbers: AP is precision averaged over recall, classes and IoU 0.50 to 0.95
(AP50 and AP75: at one IoU), AR the recall with at most 1, 10 or 100 boxes an image; s, m, l are
small, medium and large objects (areas to 32², to 96², and above).
{% if '–' in numbers.values() %}A dash: no object of this size in the truth.{% endif %}
</caption>
<thead><tr>{% for name in numbers %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody><tr>{% for value in numbers.values() %}<td>{{ value }}</td>{% endfor %}</tr></tbody>
</table></div>
<h2>Accuracy by class</h2>
<div class="wide"><table>
<thead><tr><th scope="col">class</th><th scope="col">AP</th></tr></thead>
<tbody>
{% for name, value in per_class.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
{% for picture in pictures %}
<h2>{{ picture.heading }}</h2>
<figure>
<a href="{{ picture.file }}"><img src="{{ picture.source }}" alt="{{ picture.alt }}"></a>
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
<h2>Repeat it</h2>
<pre><code>{{ commands }}</code></pre>
{% if next_steps %}
<h2>Go on</h2>
<dl class="next">
{% for what, command in next_steps %}<dt>{{ what }}</dt><dd><code>{{ command }}</code></dd>
{% endfor %}</dl>
{% endif %}
<p>{% for name, href in links %}
<a href="{{ href }}">{{ name }}</a>{{ ' · ' if not loop.last }}
{% endfor %}</p>
{% endblock %}
"""


def render_page(**content: Any) -> str:
    """Render the page of a trained detector.

    Args:
        **content: The texts title, lead and commands; the list of lines missing; facts, pairs of
            name and value; links, pairs of name and address; next_steps, pairs of purpose and
            command. Also numbers and per_class, from name to text, and pictures, dicts of file,
            source, heading, alt and caption.

    Returns:
        HTML; all text is escaped.

    Examples:
        >>> page = render_page(title='a < b', lead='', missing=[], facts=[], numbers={},
        ...                    per_class={}, pictures=[], commands='', next_steps=[], links=[])
        >>> '<h1>a &lt; b</h1>' in page
        True
    """
    return render(REPORT, **content)


def render(template: str, **content: Any) -> str:
    """Render a page of this package's look.

    Args:
        template: Extends 'layout', and fills its block ``content``.
        **content: What the template names, and the layout: the texts title and lead, the list of lines
            missing, and facts, pairs of name and value.

    Returns:
        HTML; all text is escaped.

    Examples:
        >>> template = "{% extends 'layout' %}{% block content %}<p>{{ more }}</p>{% endblock %}"
        >>> page = render(template, title='', lead='', missing=[], facts=[], more='a < b')
        >>> '<p>a &lt; b</p>' in page
        True
    """
    templates = DictLoader(dict(layout=LAYOUT, page=template))
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template('page').render(**content)
