"""The READMEs and metafiles of the families: up to date, complete, and found by mmengine."""

import json
from pathlib import Path

import pytest
import yaml
from mmengine.hub import get_config

from sasa_det.evaluation.costs import Costs
from tools.paper import model_zoo
from tools.paper.model_zoo import CONFIGS, FAMILIES, Model, as_metafile, as_tables

ROOT = Path(__file__).resolve().parents[3]


def test_every_family_is_up_to_date():
    assert model_zoo.write(CONFIGS) == []


def test_every_leaf_is_in_a_metafile_that_the_index_names():
    index = yaml.safe_load((ROOT / 'sasa_det/.mim/model-index.yml').read_text())
    named = set()
    for path in index['Import']:
        content = yaml.safe_load((CONFIGS.parent / path).read_text())
        (collection,) = content['Collections']
        assert (CONFIGS.parent / collection['README']).is_file()
        for model in content['Models']:
            assert model['In Collection'] == collection['Name']
            assert Path(model['Config']).stem == model['Name']
            named.add(model['Config'])
    leaves = {
        f'configs/{path.relative_to(CONFIGS)}'
        for path in CONFIGS.glob('*/*.py')
        if path.parent.name != '_base_'
    }
    assert named == leaves


def test_mmengine_finds_a_config_by_its_metafile():
    config = get_config('sasa_det::quickstart/retinanet_sasa-tiny_digits.py')
    assert config.model.backbone.type == 'SASAResNet'


@pytest.fixture
def models(tmp_path, monkeypatch):
    """One that was measured, one that only the paper has a figure of."""
    measured = dict(
        config='a', label='attention', epochs=8, batch_size=4, parameters=1, paper_flops=2, flops=3
    )
    measured['results'] = {'0': dict(AP=40.0), '1': dict(AP=42.0)}
    (tmp_path / 'measured.json').write_text(json.dumps([measured]))
    monkeypatch.setattr(model_zoo, 'CONFIGS', tmp_path)
    entry = model_zoo.load_measured()['a']
    costs = Costs(2_000_000, 3 * 10**9, 2 * 10**9)
    return [Model('a', 8, costs, entry, None), Model('b', 12, costs, None, dict(AP=36.6))]


def test_measured_and_the_papers_figures_are_told_apart(models):
    table = as_tables('bccd', models).splitlines()
    assert table[0].endswith("| AP, measured | AP, the paper's |")
    assert table[2] == '| [a](a.py) | 8 | 2.00 | 2.00 | 41.0 ± 1.0 (2 seeds, batch 4) |  |'
    assert table[3].endswith('|  | 36.6 |')
    first, second = yaml.safe_load(as_metafile('bccd', models))['Models']
    assert first['Results'][0]['Metrics'] == {'box AP': 41.0, 'batch size': 4}
    assert 'Results' not in second
    assert second['Metadata']['box AP in the paper, not measured here'] == 36.6


def test_a_family_of_two_data_sets_has_two_tables():
    models = [Model(f'x_{data}', 8, Costs(1, 1, 1), None, None) for data in ('bccd', 'digits')]
    first, second = as_tables('ablations', models).split('\n\n### ')
    assert first.startswith('### Digits\n') and 'GFLOPs at 192 x 192' in first
    assert second.startswith('BCCD\n') and 'GFLOPs at 256 x 320' in second
    content = yaml.safe_load(as_metafile('ablations', models))
    assert content['Collections'][0]['Metadata']['Training Data'] == ['BCCD', 'Digits']
    sizes = [model['Metadata']['Image size'] for model in content['Models']]
    assert sizes == [[256, 320], [192, 192]]


def test_a_readme_without_marks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(model_zoo, 'find_models', lambda folder: [])
    (tmp_path / next(iter(FAMILIES))).mkdir()
    (tmp_path / next(iter(FAMILIES)) / 'README.md').write_text('# Mine\n')
    with pytest.raises(ValueError, match='must have the lines'):
        model_zoo.write(tmp_path)


def test_the_plot_has_each_mean_at_its_flops(tmp_path, monkeypatch):
    figure = model_zoo.draw_measured()
    measured = model_zoo.load_measured()
    drawn = {
        (container.get_label(), float(container[0].get_xdata()[0])): float(
            container[0].get_ydata()[0]
        )
        for axes in figure.axes
        for container in axes.containers
    }
    assert drawn == {
        (entry.label, entry.costs.flops / 1e9): entry.mean('AP')
        for entry in measured.values()
        # Of their configs' own batch. docs/ablations.md has the ablations.
        if entry.batch_size in (4, 8) and not (CONFIGS / 'ablations' / f'{entry.name}.py').exists()
    }
    monkeypatch.setattr(model_zoo, 'write', lambda root: [])
    assert model_zoo.main(['--plot', str(tmp_path / 'measured.png')]) == 0
    assert (tmp_path / 'measured.png').read_bytes().startswith(b'\x89PNG')
