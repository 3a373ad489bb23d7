"""Whole models: torch's alone, layer by layer, and what an interruption leaves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sasa_det.convert import convert
from sasa_det.convert.conversion import images_needed
from sasa_det.convert.walk import watch_calls
from sasa_det.layers import LocalSelfAttention2d


class Bottleneck(nn.Module):
    def __init__(self, channels, stride=1):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.conv = nn.Conv2d(channels // 2, channels // 2, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels // 2)
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        self.stride = stride

    def forward(self, x):
        y = self.expand(self.norm(self.conv(self.reduce(x))).relu())
        return (x[:, :, :: self.stride, :: self.stride] + y).relu()


class Network(nn.Module):
    """A stem, bottlenecks, and a tower that two levels share."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, 2, 2)
        self.blocks = nn.Sequential(Bottleneck(32), Bottleneck(32, 2))
        self.tower = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 32, 3, padding=1)
        )
        self.unused = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        fine = self.blocks(self.stem(x))
        return [self.tower(level) for level in (fine, fine[:, :, ::2, ::2])]


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 16, 16, generator=generator), scale_factor=4.0)


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        network(images(32))  # for batch norm's statistics
    return network.eval()


@pytest.fixture(scope='module')
def conversion(teacher):
    return convert(teacher, images(16, 1))


def left(student, teacher, x):
    """The share of the teacher's variance that is left, at the finer level."""
    return left_of(lambda x: student(x)[0], lambda x: teacher(x)[0], x)


@torch.no_grad()
def left_of(student, teacher, x):
    truth, result = teacher(x), student(x)
    return ((result - truth).var((0, 2, 3)).sum() / truth.var((0, 2, 3)).sum()).item()


def test_the_student_computes_nearly_the_same(teacher, conversion):
    names = ['blocks.0.conv', 'blocks.1.conv', 'tower.0', 'tower.2']
    assert list(conversion.attention) == list(conversion.fitted) == names
    assert all(
        isinstance(conversion.model.get_submodule(name), LocalSelfAttention2d) for name in names
    )
    assert conversion.kept == dict(
        stem='its kernel is 5 x 5', unused='these images do not reach it'
    )
    # On other images, where random attention would leave more than the whole variance.
    found = left(conversion.model, teacher, images(8, 2))
    assert found < 0.5
    assert found == pytest.approx(conversion.fitted['tower.2'].unexplained, abs=0.08)
    for fitted in conversion.fitted.values():
        assert 0 <= fitted.unavoidable < fitted.unexplained < 0.5


def test_the_teacher_stays_as_it_was(teacher):
    before = copy.deepcopy(teacher.state_dict())
    convert(teacher, images(4))
    assert not any(isinstance(module, LocalSelfAttention2d) for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_seed_gives_the_same_bits(teacher, conversion):
    again = convert(teacher, images(16, 1))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, conversion.model.state_dict()[name]), name


def test_later_layers_correct_the_errors_of_earlier_ones(teacher, conversion):
    """Each layer by itself on the teacher's inputs would pile errors up."""
    apart = copy.deepcopy(teacher)
    for name in conversion.attention:
        alone = convert(teacher, images(16, 1), layers=[name]).model
        parent, _, key = name.rpartition('.')
        setattr(apart.get_submodule(parent), key, alone.get_submodule(name))
    x = images(8, 2)
    assert left(conversion.model, teacher, x) < left(apart, teacher, x)


def test_batch_norm_follows_what_changed(teacher, conversion):
    """The student's normalised maps have the teacher's mean and variance."""
    x = images(16, 1)
    seen = []
    for model in (teacher, conversion.model):
        handle = model.blocks[0].norm.register_forward_hook(lambda *args: seen.append(args[2]))
        with torch.no_grad():
            model(x)
        handle.remove()
    truth, result = seen
    torch.testing.assert_close(result.mean((0, 2, 3)), truth.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.var((0, 2, 3)), truth.var((0, 2, 3)), atol=1e-3, rtol=1e-3)
    before, after = teacher.blocks[0].norm, conversion.model.blocks[0].norm
    assert not torch.equal(before.running_var, after.running_var)
    assert torch.equal(before.weight, after.weight)


def test_goes_on_where_it_was_interrupted(teacher, conversion):
    done = {}

    def stop_at_the_tower(name, fitted, layer):
        if fitted is not None:
            done[name] = copy.deepcopy(layer.state_dict())
        elif name == 'tower.0':
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(teacher, images(16, 1), tell=stop_at_the_tower)
    assert list(done) == ['blocks.0.conv', 'blocks.1.conv']
    told = []
    whole = convert(teacher, images(16, 1), done=done, tell=lambda name, *_: told.append(name))
    assert set(told) == {'tower.0', 'tower.2'}
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, conversion.model.state_dict()[name], msg=name)


def test_a_layer_that_was_done_waits_for_one_that_is_refitted(teacher):
    """What two levels share and no file keeps is fitted again, and what follows it measured after that."""
    model = nn.ModuleDict(
        dict(
            first=nn.Conv2d(16, 16, 3, padding=1),
            shared=nn.Conv2d(16, 16, 1),
            last=nn.Conv2d(16, 16, 3, padding=1),
        )
    )

    def run(model, x):
        x = model['first'](x)
        return [model['last'](model['shared'](level)) for level in (x, x[:, :, ::2, ::2])]

    x = F.interpolate(torch.randn(8, 16, 8, 8), scale_factor=2.0)
    whole = convert(model, x, stages=[run])
    done = {name: whole.model[name].state_dict() for name in ('first', 'last')}
    again = convert(model, x, stages=[run], done=done)
    for name, fitted in whole.fitted.items():
        assert 0 < again.fitted[name].unexplained == pytest.approx(fitted.unexplained, abs=1e-3)


def test_what_levels_share_computes_each_map_once(teacher):
    model, runs = copy.deepcopy(teacher), []
    for name in ('tower.0', 'tower.2'):
        model.get_submodule(name).register_forward_hook(
            lambda conv, args, output, name=name: runs.append((name, len(args[0])))
        )
    convert(model, images(4))
    # Beside one image that shows which layers are called.
    assert sorted(run for run in runs if run[1] == 4) == [('tower.0', 4)] * 2 + [('tower.2', 4)] * 2


def test_a_layer_may_read_several_that_levels_share():
    """So may the next stage, though each of these maps was left out of some run of the stage."""
    torch.manual_seed(0)
    convs = {name: nn.Conv2d(16, 16, 3, padding=1) for name in ('a', 'b', 'c', 'last')}
    model = nn.ModuleDict(convs)

    def levels(model, x):
        first = [model['a'](level) for level in (x, x[:, :, ::2, ::2])]
        second = [model['b'](each.relu()) for each in first]
        return [first, [model['c'](y + z) for y, z in zip(first, second)]]

    def sums(model, state):
        return model['last'](state[0][0] + state[1][0])

    x = F.interpolate(torch.randn(8, 16, 8, 8), scale_factor=2.0, mode='bicubic')
    found = convert(model, x, stages=[levels, sums])
    assert list(found.fitted) == ['a', 'b', 'c', 'last']
    assert all(0 < fitted.unexplained < 0.6 for fitted in found.fitted.values())
    with torch.no_grad():
        truth, result = (sums(each, levels(each, x[6:])) for each in (model, found.model))
    # Of the images that are held out.
    left = (
        (result - truth).square().sum() / (truth - truth.mean((0, 2, 3), True)).square().sum()
    ).item()
    assert found.fitted['last'].unexplained == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    'norm', [nn.BatchNorm2d(16, track_running_stats=False), nn.BatchNorm1d(16)], ids=str
)
def test_other_batch_norms_keep_the_halves_apart(norm):
    torch.manual_seed(0)
    pooling = nn.Flatten(2) if norm.track_running_stats else nn.Identity()
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), pooling, norm)
    x = F.interpolate(torch.randn(8, 16, 8, 8), scale_factor=2.0)
    with torch.no_grad():
        model.train()(x)
    model.eval()
    student = convert(model, x).model
    with torch.no_grad():
        truth, result = (each(x).flatten(2) for each in (model, student))
    # Both are normalised, each by its own statistics.
    assert (result - truth).square().mean() < 0.5 * truth.var()
    torch.testing.assert_close(result.var((0, 2)), truth.var((0, 2)), rtol=0.02, atol=0.0)


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_model_that_computes_no_finite_numbers_is_refused(number):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1))
    with torch.no_grad():
        model[0].weight[3, 3] = number
    with pytest.raises(ValueError, match='outputs of 0 must be finite .* some are infinite or NaN'):
        convert(model, torch.randn(4, 16, 8, 8))


def test_random_numbers_of_others_stay_as_they_are(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    before = torch.get_rng_state()
    convert(model, torch.zeros(2, 16, 8, 8))
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_many_channels_are_fitted_in_fewer_directions(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 16, 3, 2, 1))
    x = F.interpolate(torch.randn(8, 8, 12, 12), scale_factor=2.0, mode='bicubic')
    whole = convert(model, x, layers=['1']).fitted['1']
    monkeypatch.setattr('sasa_det.convert.walk.MOST_CHANNELS', 16)
    fewer = convert(model, x, layers=['1'])
    # All of the 64 channels lie in 8 directions.
    assert fewer.fitted['1'].unexplained == pytest.approx(whole.unexplained, abs=0.05)
    assert left_of(fewer.model, model, x) == pytest.approx(whole.unexplained, abs=0.1)


def test_shared_layers_are_converted_once(teacher):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model.append(model[0])
    x = F.interpolate(torch.randn(6, 16, 8, 8), scale_factor=2.0)
    student = convert(model, x).model
    assert student[0] is student[2] and isinstance(student[0], LocalSelfAttention2d)


def test_calls_are_those_of_the_levels(teacher):
    calls = watch_calls(teacher, ['tower.0', 'stem', 'unused'], [lambda m, x: m(x)], images(1))
    assert list(calls) == ['stem', 'tower.0']
    assert [output for _, output in calls['tower.0']] == [(1, 32, 16, 16), (1, 32, 8, 8)]


def test_images_needed_are_those_of_the_smallest_map():
    shape = torch.Size([1, 64, 6, 6])
    large = torch.Size([1, 64, 60, 60])
    layers = dict(
        a=([(large, large)], nn.Conv2d(64, 64, 3)),
        b=([(large, shape)], nn.Conv2d(128, 128, 3)),
    )
    # 9 * 128 inputs, 36 pixels per image, and a fourth of the images are held out.
    assert images_needed(layers) == 43


@pytest.mark.parametrize(
    'model, count, message',
    [
        (nn.Conv2d(16, 16, 3, padding=1), 1, 'at least two images, but there are 1'),
        (nn.Conv2d(3, 16, 7), 4, r'no convolution .* can be converted \(: its kernel is 7 x 7\)'),
        (nn.Conv2d(16, 16, 3, padding=1), 4, r'\(: it is the whole model; put it into an nn.Seq'),
        (nn.Conv2d(3, 16, 1), 4, r'no convolution .* can be converted \(it has none\)'),
    ],
)
def test_refuses(model, count, message):
    with pytest.raises(ValueError, match=message):
        convert(model, torch.randn(count, 16, 8, 8))
