"""The paper's ablations beside ours: up to date, complete or left out, and in their order."""

import pytest

from sasa_det.configs import shipped_configs
from sasa_det.evaluation.costs import Costs
from sasa_det.experiments.compare import Entry
from tools.paper import ablations
from tools.paper.ablations import DATA, DOCUMENT, MORE, OURS, as_table, draw, find_rows


def test_the_document_is_up_to_date():
    assert not ablations.write(DOCUMENT)


def test_each_row_is_a_config_on_each_data_set():
    names = [*OURS.values(), *(name for more in MORE.values() for name in more.values())]
    assert {f'{name}_{data}' for name in names for data in DATA} <= shipped_configs().keys()


@pytest.fixture
def measured():
    """All rows of Table 6 on the digits, and all but one on BCCD."""
    aps = {'-qr': 80.0, '': 82.0, '-nopos': 70.0, '-static': 81.0}
    return {
        f'retinanet_sasa-tiny{name}_{data}': Entry(
            name, Costs(1, 1, 1), {0: dict(AP=ap - 1), 1: dict(AP=ap + 1)}, None, 8, 8
        )
        for name, ap in aps.items()
        for data in DATA
        if (name, data) != ('-static', 'bccd')
    }


def test_a_data_set_is_shown_once_all_its_rows_are_there(measured):
    lines = as_table(find_rows('6', measured)).splitlines()
    assert lines[0] == "|  | top-1, the paper's | order | AP, digits | order |"
    assert lines[2:6] == [
        '| q.r | 76.9 | 2 | 80.0 ± 1.0 | 3 |',
        '| q.k + q.r | 77.4 | 1 | 82.0 ± 1.0 | 1 |',
        '| q.k |  |  | 70.0 ± 1.0 | 4 |',
        '| the same weights at every pixel |  |  | 81.0 ± 1.0 | 2 |',
    ]
    assert lines[-1] == 'Our rows have not all been trained yet on: BCCD.'
    name = 'retinanet_sasa-tiny-qr_digits'
    measured[name] = measured[name]._replace(batch_size=16)
    assert 'AP' not in as_table(find_rows('6', measured))


def test_the_plot_has_our_means_with_their_errors(measured):
    axes = draw(measured).axes[2 * 3 + 1]
    assert axes.get_title() == 'AP, digits'
    points = [container[0].get_xydata()[0].tolist() for container in axes.containers]
    assert points == [[80, 0], [82, 1], [70, 2], [81, 3]]
    assert all(container.has_xerr for container in axes.containers)
