"""A file is the old one or the new one, whatever stops its writer."""

import os

import pytest

from sasa_det.files import written_whole


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_what_stops_halfway_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / 'numbers.txt'
    path.write_text('old')
    with pytest.raises(error), written_whole(path) as partial:
        partial.write_text('ne')
        raise error
    assert [each.name for each in tmp_path.iterdir()] == ['numbers.txt']
    assert path.read_text() == 'old'


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / 'numbers.txt'
    with written_whole(path) as one, written_whole(path) as other:
        one.write_text('one')
        other.write_text('other')
        assert not path.exists()
    assert path.read_text() == 'one'  # renamed last
    assert [each.name for each in tmp_path.iterdir()] == ['numbers.txt']


def test_the_disk_has_it_before_the_renaming(tmp_path, monkeypatch):
    path, synced = tmp_path / 'numbers.txt', []
    monkeypatch.setattr(os, 'fsync', lambda descriptor: synced.append(os.read(descriptor, 9)))
    with written_whole(path) as partial:
        partial.write_text('fast')
    with written_whole(path, sync=True) as partial:
        partial.write_text('safe')
        assert path.read_text() == 'fast' and not synced
    assert synced == [b'safe'] and path.read_text() == 'safe'


def test_a_folder_takes_the_place_of_what_a_killed_run_left(tmp_path):
    partial = tmp_path / 'set.partial'
    partial.mkdir()
    (partial / 'left').touch()
    with pytest.raises(RuntimeError), written_whole(tmp_path / 'set', partial=partial) as place:
        (place / 'new').mkdir(parents=True)
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with written_whole(tmp_path / 'set', partial=partial) as place:
        (place / 'new').mkdir(parents=True)
    assert [each.name for each in tmp_path.rglob('*')] == ['set', 'new']
