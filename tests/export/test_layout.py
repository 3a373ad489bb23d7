import torch
from small_detectors import build

from sasa_det.export.layout import to_channels_last


@torch.no_grad()
def test_maps_are_channels_last_and_values_the_same(images):
    detector = build('retina')
    other = to_channels_last(detector)
    for ours, theirs in zip(other.extract_feat(images), detector.extract_feat(images)):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert theirs.is_contiguous()
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(each.is_contiguous() for each in detector.parameters())
