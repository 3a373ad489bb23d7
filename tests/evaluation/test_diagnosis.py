"""What heads attend to: the numbers of rigged heads, and what is left when a term is taken away."""

import math

import pytest
import torch
from mmengine.config import Config
from torch import nn

from sasa_det.evaluation.accuracy import build_validation, evaluate
from sasa_det.evaluation.diagnosis import diagnose, diagnose_heads, mean_of_heads, spread
from sasa_det.evaluation.diagnosis_accuracy import (
    AWAY,
    Case,
    list_cases,
    measure,
    taken_away,
)
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.local_self_attention import AttentionTerms
from sasa_det.layers.projection import project_by
from sasa_det.ops import local_attention


def terms_of(content, position):
    logits = sum(term for term in (content, position) if term is not None)
    return AttentionTerms(logits.flatten(2).softmax(-1).view_as(logits), content, position)


def random_layer(**options):
    torch.manual_seed(0)
    options = dict(kernel_size=3, num_heads=2, bias=True, init='random', **options)
    layer = LocalSelfAttention2d(8, **options)
    nn.init.normal_(layer.query.bias)
    return layer


class TestHeads:
    def test_one_that_looks_at_one_place(self):
        position = torch.zeros(10, 1, 5, 5)
        position[:, :, 3, 0] = 50
        (head,) = diagnose_heads(terms_of(None, position), dilation=2)
        assert (head.dy, head.dx) == (2, -4)
        assert head.entropy == 0 and head.largest_weight == 1
        assert (head.share_qk, head.share_qr, head.share_fixed) == (0, 0, 1)
        assert head.moved == 0 and head.static

    def test_one_that_looks_everywhere(self):
        (head,) = diagnose_heads(terms_of(torch.zeros(10, 1, 3, 3), None))
        assert head.entropy == 1 and head.entropy_nats == pytest.approx(math.log(9), abs=1e-6)
        assert head.largest_weight == pytest.approx(1 / 9, abs=1e-6)
        assert (head.dy, head.dx) == (0, 0)
        assert head.share_fixed == 1 and head.static

    def test_one_that_follows_the_content(self):
        torch.manual_seed(0)
        content = torch.zeros(9, 1, 3, 3)
        content.flatten(1)[range(9), range(9)] = 50  # another place at each pixel
        (head,) = diagnose_heads(terms_of(content, torch.randn(1, 1, 3, 3).expand(9, -1, -1, -1)))
        assert head.entropy == 0 and head.moved == pytest.approx(8 / 9, abs=1e-6)
        assert not head.static and head.share_qk > 0.95 and head.share_qr == 0

    def test_one_that_moves_at_few_pixels_is_not_static(self):
        position = torch.zeros(100, 2, 3, 3)
        position[:, :, 0, 1] = 50
        position[:5, 1, 2, 1] = 100
        still, rare = diagnose_heads(terms_of(None, position))
        assert still.static and not rare.static
        assert rare.moved == pytest.approx(0.05 * 0.95 * 2, abs=1e-6)

    def test_shares_are_those_of_independent_parts(self):
        """Parts that have nothing to do with each other have the shares of their variances."""
        torch.manual_seed(0)
        parts = dict(
            share_qk=2 * torch.randn(20000, 1, 3, 3),
            share_qr=torch.randn(20000, 1, 3, 3),
            share_fixed=3 * torch.randn(1, 1, 3, 3).expand(20000, -1, -1, -1),
        )
        position = parts['share_qr'] + parts['share_fixed']
        (head,) = diagnose_heads(terms_of(parts['share_qk'], position))
        centred = {k: p - p.mean((2, 3), keepdim=True) for k, p in parts.items()}
        variances = {name: part.square().mean() for name, part in centred.items()}
        for name, variance in variances.items():
            share = variance / sum(variances.values())
            assert getattr(head, name) == pytest.approx(share.item(), abs=0.01), name
        assert head.share_qk + head.share_qr + head.share_fixed == pytest.approx(1, abs=1e-5)

    def test_what_the_border_masks_counts_for_nothing(self):
        """A head of equal logits is fixed, whatever part of its window is inside of the map."""
        layer = random_layer(border='mask')
        for parameter in (layer.query.weight, layer.query.bias):
            nn.init.zeros_(parameter)
        found = diagnose(nn.Sequential(layer), [torch.randn(1, 8, 5, 5)])['0']
        for head in found.heads:
            assert (head.share_qk, head.share_qr, head.share_fixed) == (0, 0, 1)
            assert 0.8 < head.entropy < 1 and not head.static


class TestLayers:
    def test_mean_query_and_pixels_are_of_all_images_and_levels(self):
        layer = random_layer()

        class Pyramid(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.unused = layer, random_layer()

            def forward(self, x):
                return [layer(x), layer(x[..., ::2, ::2])]

        images = [torch.randn(1, 8, 8, 12), torch.randn(1, 8, 16, 16)]
        found = diagnose(Pyramid(), images, points=24)
        assert list(found) == ['layer']
        # A quarter of the first map's pixels is asked; so it is of the next level's.
        assert found['layer'].pixels == 24 + 6 + 24 + 6
        maps = [x[..., ::step, ::step] for x in images for step in (1, 2)]
        queries = torch.cat([project_by(layer.query, x).flatten(2) for x in maps], 2)
        torch.testing.assert_close(found['layer'].query, queries.mean((0, 2)))
        assert found['layer'].weights.shape == (2, 3, 3)

    def test_the_same_seed_gives_the_same(self):
        model = nn.Sequential(random_layer())
        image = torch.randn(1, 8, 20, 20)
        first, again, other = (diagnose(model, [image], seed=seed)['0'] for seed in (0, 0, 1))
        assert first.heads == again.heads != other.heads

    def test_all_pixels_give_the_means_of_the_whole_map(self):
        layer = random_layer()
        image = torch.randn(1, 8, 6, 6)
        (found,) = diagnose(nn.Sequential(layer), [image], points=36).values()
        points = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        weights = layer.attention_weights(image, points)
        torch.testing.assert_close(found.weights, weights.mean(0))
        largest = weights.flatten(2).amax(-1).mean(0)
        assert [head.largest_weight for head in found.heads] == pytest.approx(
            largest.tolist(), abs=1e-5
        )
        means = mean_of_heads({'0': found})
        assert means['largest_weight'] == pytest.approx(largest.mean().item(), abs=1e-5)

    def test_images_are_taken_from_all_over_the_data(self):
        data = [dict(inputs=i) for i in range(11)]
        assert [image['inputs'] for image in spread(data, 3)] == [[0], [5], [10]]
        assert len(spread(data, 100)) == 11


X = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(0))


class TestTakenAway:
    def output(self, case, layer, queries=None):
        model = nn.Sequential(layer)
        before = dict(model.named_parameters())
        with torch.no_grad(), taken_away(model, case, {'0': queries}):
            output = model(X)
        after = dict(model.named_parameters())
        assert list(before) == list(after)
        assert all(before[name] is after[name] for name in before)
        return output

    def expected(self, layer, key=True, tables=True, query=None):
        with torch.no_grad():
            q, k, v = (project_by(each, X) for each in (layer.query, layer.key, layer.value))
            q = q if query is None else query.view(1, -1, 1, 1).expand_as(q)
            return local_attention(
                q, k if key else None, v, *((layer.rel_row, layer.rel_col) if tables else ()),
                kernel_size=3, num_heads=2,
            )  # fmt: skip

    def test_each_term(self):
        layer = random_layer()
        query = torch.randn(8)
        found = {away: self.output(Case(away), layer, query) for away in (None, *AWAY)}
        torch.testing.assert_close(found[None], self.expected(layer))
        torch.testing.assert_close(found['q.k'], self.expected(layer, key=False))
        torch.testing.assert_close(found['q.r'], self.expected(layer, tables=False))
        torch.testing.assert_close(found['pixel'], self.expected(layer, key=False, query=query))
        assert min((found[None] - found[away]).abs().max() for away in AWAY) > 0.01

    def test_without_its_only_term_a_window_is_averaged(self):
        mean = torch.full((8, 1, 3, 3), 1 / 9)
        for layer, cases in (
            (random_layer(position='none'), ('q.k', 'pixel')),
            (random_layer(logits='qr'), ('q.r',)),
        ):
            values = project_by(layer.value, X).detach()
            expected = torch.nn.functional.conv2d(values, mean, padding=1, groups=8)
            for away in cases:
                torch.testing.assert_close(self.output(Case(away), layer, None), expected)

    def test_one_layer_only(self):
        model = nn.Sequential(random_layer(), random_layer())
        with taken_away(model, Case('q.k', '1'), {}):
            assert model[0].key.weight.any() and not model[1].key.weight.any()

    def test_an_error_in_between_leaves_the_model_as_it_was(self):
        model = nn.Sequential(random_layer())
        before = model[0].rel_row
        with pytest.raises(RuntimeError), taken_away(model, Case('q.r'), {}):
            raise RuntimeError
        assert model[0].rel_row is before

    def test_only_what_is_there_is_listed(self):
        kinds = dict(
            both=({}, list(AWAY)),
            keys=(dict(position='none'), ['q.k', 'pixel']),
            positions=(dict(logits='qr'), ['q.r', 'pixel']),
            static=(dict(logits='qr', constant_query=True), ['q.r']),
        )
        for options, expected in kinds.values():
            model = nn.Sequential(random_layer(**options))
            assert [case.away for case in list_cases(model)] == [None, *expected]
        model = nn.Sequential(random_layer(position='none'), random_layer(logits='qr'))
        assert list_cases(model, per_layer=True)[4:] == [
            Case('q.k', '0'), Case('pixel', '0'), Case('q.r', '1'), Case('pixel', '1')
        ]  # fmt: skip

    def test_each_case_is_measured_on_its_own(self):
        model = nn.Sequential(random_layer())
        query = {'0': torch.zeros(8)}
        found = measure(model, list_cases(model), query, lambda case: model(X).sum().item())
        assert list(found) == list_cases(model) and len(set(found.values())) == 4
        assert found[Case()] == model(X).sum().item()

    def test_where_nothing_is_found_the_numbers_are_zero(self):
        """mmdet's CocoMetric gives none then."""
        model = nn.Sequential(random_layer())
        cases = list_cases(model)[:3]
        found = measure(model, cases, {}, lambda case: {} if case.away == 'q.r' else dict(AP=0.5))
        assert list(found.values()) == [dict(AP=0.5), dict(AP=0.5), dict(AP=0.0)]
        assert list(measure(model, cases, {}, lambda case: {}).values()) == [{}] * 3


class TestEvaluation:
    def test_is_that_of_mmdet(self, make_config, checkpoint):
        """A plain loop gives the same numbers, and the model stays in training."""
        from sasa_det.checkpoints.detector import load_detector

        path = make_config()
        config = Config.fromfile(path)
        config.val_dataloader = config.test_dataloader
        config.val_evaluator = config.test_evaluator
        # The scores of random weights are around 0.01.
        config.model.test_cfg.score_thr = 0.0
        model = load_detector(config, checkpoint(path)).train()
        loader, evaluator = build_validation(config)
        batches = []
        numbers = evaluate(model, loader, evaluator, lambda: batches.append(1))
        assert model.training and len(batches) == len(loader) == 5
        assert next(iter(numbers)) == 'coco/bbox_mAP'
        model.eval()
        for batch in loader:
            evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
        assert numbers == evaluator.evaluate(5)

    @pytest.mark.parametrize('key', ['val_dataloader', 'val_evaluator'])
    def test_a_config_without_validation_is_named(self, make_config, key):
        config = Config.fromfile(make_config())
        config[key] = None
        with pytest.raises(ValueError, match=f'tiny_attention.py: {key} is not set'):
            build_validation(config)
