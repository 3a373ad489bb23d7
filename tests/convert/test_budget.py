"""Which layers a budget chooses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sasa_det.convert.budget import (
    Budget,
    Offer,
    Offers,
    best_sets,
    choices_within,
    choose_for_ap,
    choose_for_time,
    choose_within,
    errors_alone,
    find_offers,
    read_budget,
    spend,
)
from sasa_det.convert.conversion import run_all
from sasa_det.convert.layers import choose_layers
from sasa_det.convert.walk import watch_calls


def offers(count, seed):
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    return {f'layer{i}': Offer(error, gain - 0.2) for i, (error, gain) in enumerate(draws)}


@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_finds_the_best_of_all_sets(seed, share):
    given = offers(9, seed)
    wanted = share * sum(max(0.0, offer.gain) for offer in given.values())
    chosen = choose_within(given, wanted)
    assert sum(given[name].gain for name in chosen) >= wanted
    best = min(
        sum(given[name].error for name in names)
        for size in range(10)
        for names in itertools.combinations(given, size)
        if sum(given[name].gain for name in names) >= wanted
    )
    # Gains are rounded, by a two-thousandth of what is wanted for each layer.
    assert sum(given[name].error for name in chosen) <= best + 0.02


def test_what_gains_nothing_is_never_chosen():
    given = dict(a=Offer(0.0, -1.0), b=Offer(0.5, 1.0))
    assert choose_within(given, 0.9) == ['b'] and choose_within(given, 0) == []
    with pytest.raises(ValueError, match='gain less than is wanted'):
        choose_within(given, 1.1)


def test_the_best_sets_save_more_for_more_error():
    given = Offers(offers(8, 3), 10.0)
    shares, errors = zip(*(given.sums(names) for names in best_sets(given.layers)))
    assert list(shares) == sorted(shares, reverse=True) and list(errors) == sorted(errors)
    assert (shares[0], errors[0]) == (1, 0) and shares[-1] < 0.8


@pytest.mark.parametrize('change', [-0.3, -0.9, -5])
def test_a_budget_of_ap_gains_the_most_time_that_it_allows(change):
    given = offers(8, 3)
    tried = []

    def measure(names):
        tried.append(names)
        return -sum(given[name].error for name in names)

    chosen = choose_for_ap(given, change, measure)
    fitting = [names for names in best_sets(given) if measure(names) >= change]
    assert chosen == fitting[-1] and chosen in tried[:5]


def test_a_budget_of_ap_that_no_layer_keeps_is_told():
    with pytest.raises(ValueError, match=r'reaches ap=-0.1; the fewest .* change AP by -3.0'):
        choose_for_ap(offers(8, 3), -0.1, lambda names: -3.0)
    with pytest.raises(ValueError, match='no layer gains time on this machine'):
        choose_for_ap(dict(a=Offer(0.0, -1.0)), -0.1, lambda names: 0.0)


def never(names):
    raise AssertionError('nothing is to be measured')


# Together, layers gain less or more than the sum of what each gains, and each set is measured with an error.
@pytest.mark.parametrize('worth', [0.5, 1.0, 1.5])
@pytest.mark.parametrize('share', [0.7, 0.8, 0.9])
@pytest.mark.parametrize('seed', range(3))
def test_a_budget_of_time_holds_for_the_whole_detector(worth, share, seed):
    given = Offers(offers(9, seed), 10.0)
    noise = torch.Generator().manual_seed(seed)
    measured = {}

    def measure(names):
        error = 0.01 * torch.randn((), generator=noise).item()
        measured[tuple(names)] = 1 - worth * (1 - given.sums(names)[0]) + error
        return measured[tuple(names)]

    useful = [name for name, offer in given.layers.items() if offer.gain > 0]
    if 1 - worth * (1 - given.sums(useful)[0]) > share:
        with pytest.raises(
            ValueError, match=rf'reaches time={share}; all that gain time .* 0\.\d\d\d'
        ):
            choose_for_time(given, share, measure)
        return
    chosen = choose_for_time(given, share, measure)
    assert measured[tuple(chosen)] <= share and len(measured) <= 7
    # No more is spent than the best set for this share takes, but for the errors of measuring.
    needed = (1 - share + 0.03) / worth * given.total
    most = sum(given.layers[name].gain for name in useful)
    best = choose_within(given.layers, min(needed, most * (1 - 1e-9)))
    assert given.sums(chosen)[1] <= given.sums(best)[1] + 1e-9


def test_what_is_no_slower_stays_as_it_is():
    slow = Offers(dict(a=Offer(0.1, -3.0), b=Offer(0.0, 0.0)), 10.0)
    assert choose_for_time(slow, 1.0, never) == []
    assert choose_for_time(slow, 0.0, never) == []
    with pytest.raises(ValueError, match='no layer gains time on this machine'):
        choose_for_time(slow, 0.99, never)


def test_the_least_time_is_that_of_all_that_gains():
    given = Offers(dict(a=Offer(0.1, 3.0), b=Offer(0.0, -1.0), c=Offer(0.2, 1.0)), 10.0)
    assert choose_for_time(given, 0.0, lambda names: 0.6) == ['a', 'c']
    assert choose_for_time(given, 0.0, lambda names: 1.02) == []


@pytest.mark.parametrize(
    'text',
    ['time', 'time=', 'time=1.5', 'time=0', 'memory=0.5', 'time=-1', '0.8', 'ap=1', 'ap=least'],
)
def test_refuses_other_budgets(text):
    with pytest.raises(ValueError, match=r'is time=SHARE or flops=SHARE, .* but is'):
        read_budget(text)
    assert read_budget('flops=0.7') == Budget('flops', 0.7)
    assert read_budget('ap=-1.5') == Budget('ap', -1.5)
    assert read_budget('time=1.0') == Budget('time', 1.0)
    assert read_budget('time=least') == Budget('time', 0.0)


@pytest.fixture(scope='module')
def network():
    """Layers of one size; the first computes nothing, so its conversion costs nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].weight[:, :, 1, 1] += torch.eye(32)
    return model.eval(), F.interpolate(torch.randn(8, 32, 12, 12), scale_factor=2.0)


def test_errors_are_those_of_each_layer_alone(network):
    model, images = network
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = {name: choice.attn_cfg for name, choice in choose_layers(model).items()}
    errors, student = errors_alone(model, attention, [run_all], images, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(errors) == ['0', '1', '2', '3']
    assert errors['0'] < 0.05 < errors['1'] < 1
    alone = nn.Sequential(model[0], model[1], student[2], model[3])
    with torch.no_grad():
        truth, found = model(images[-2:]), alone(images[-2:])
    expected = ((truth - found).square().mean() / truth.var(correction=0)).item()
    assert errors['2'] == pytest.approx(expected, rel=1e-4)


def test_a_budget_of_flops_keeps_the_layers_of_most_error(network):
    model, images = network
    choices = choose_layers(model)
    calls = watch_calls(model, list(choices), [run_all], images[:1])
    told = []
    found = find_offers('flops', model, choices, [run_all], images, calls, tell=told.append)
    assert told == [1, 2, 3, 4]
    budget = Budget('flops', 0.8)
    chosen = spend(budget, found, never)
    assert '0' in chosen and 0 < len(chosen) < 4
    assert found.sums(chosen)[0] <= 0.8
    # A multiply-add of each of the nine neighbours is two FLOPs.
    assert found.total == pytest.approx(4 * 2 * 9 * 32 * 32 * 24 * 24 / 1e9)
    within = choices_within(budget, choices, found, chosen)
    assert [name for name, choice in within.items() if choice.attn_cfg] == chosen
    kept = {choice.reason for choice in within.values() if choice.attn_cfg is None}
    assert kept == {'the budget is met without it'}
    with pytest.raises(
        ValueError, match=r'no choice .* reaches flops=0.1; all .* together reach 0\.\d\d'
    ):
        spend(Budget('flops', 0.1), found, never)
    assert spend(Budget('flops', 0.0), found, never) == ['0', '1', '2', '3']
    assert spend(Budget('flops', 1.0), found, never) == []
