import pytest

from sasa_det.evaluation.training_log import read_training_log


def train(step, loss, epoch):
    return dict(lr=0.1, loss=loss, loss_cls=loss / 2, time=0.5, epoch=epoch, iter=step, step=step)


def val(step, ap):
    return {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': 2 * ap, 'time': 0.1, 'step': step}


def test_a_resumed_run_replaces_what_it_repeats(tmp_path, write_run):
    # Epochs of 20 iterations. The first run stops in epoch 4; its last checkpoint is of epoch 2.
    first = [train(10, 9.0, 1), train(20, 8.0, 1), val(1, 0.1), train(30, 7.0, 2),
             train(40, 6.0, 2), val(2, 0.2), train(50, 99.0, 3), train(60, 99.0, 3), val(3, 0.9),
             train(70, 99.0, 4)]  # fmt: skip
    second = [train(50, 5.0, 3), train(60, 4.0, 3), val(3, 0.3)]
    # Written out of order: only the timestamp counts. A test run leaves no losses.
    newer = write_run(tmp_path, '20260102_000000', second)
    older = write_run(tmp_path, '20260101_235959', first)
    write_run(tmp_path, '20260103_000000', [])
    log = read_training_log(tmp_path)
    assert [record['step'] for record in log.train] == [10, 20, 30, 40, 50, 60]
    assert [record['loss'] for record in log.train] == [9, 8, 7, 6, 5, 4]
    assert [(record['step'], record['coco/bbox_mAP']) for record in log.val] == [
        (1, 0.1), (2, 0.2), (3, 0.3)
    ]  # fmt: skip
    assert log.files == [older, newer]
    assert log.val_unit == 'epoch'
    assert log.seconds == pytest.approx(60 * 0.5)


def test_a_run_from_scratch_replaces_all(tmp_path, write_run):
    write_run(tmp_path, '1', [train(10, 9.0, 1), val(1, 0.5), train(20, 8.0, 2), val(2, 0.6)])
    write_run(tmp_path, '2', [train(10, 3.0, 1), val(1, 0.1)])
    log = read_training_log(tmp_path)
    assert [record['loss'] for record in log.train] == [3]
    assert [record['coco/bbox_mAP'] for record in log.val] == [0.1]


def test_validation_by_iteration(tmp_path, write_run):
    records = [dict(loss=1.0, step=step) for step in (100, 200)]
    write_run(tmp_path, '1', [records[0], val(100, 0.1), records[1], val(200, 0.2)])
    write_run(tmp_path, '2', [dict(loss=0.5, step=200), val(200, 0.3)])
    log = read_training_log(tmp_path)
    assert log.val_unit == 'iteration'
    assert [record['step'] for record in log.val] == [100, 200]
    assert [record['coco/bbox_mAP'] for record in log.val] == [0.1, 0.3]


def test_a_line_cut_off_by_an_interruption_is_dropped(tmp_path, write_run):
    write_run(tmp_path, '1', [train(10, 9.0, 1)], tail='{"lr": 0.1, "lo')
    assert [record['step'] for record in read_training_log(tmp_path).train] == [10]


def test_bad_logs_are_named(tmp_path, write_run):
    with pytest.raises(FileNotFoundError, match='scalars.json: no such training log'):
        read_training_log(tmp_path)
    path = write_run(tmp_path, '1', [])
    with pytest.raises(ValueError, match='1/vis_data/scalars.json: no record of training'):
        read_training_log(tmp_path)
    path.write_text('garbage\n{"loss": 1, "step": 1}\n')
    with pytest.raises(ValueError, match='scalars.json: line 1 is not JSON'):
        read_training_log(tmp_path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="scalars.json: line 1 is not a record with a 'step'"):
        read_training_log(tmp_path)
    path.write_bytes(b'\xff\n{"loss": 1, "step": 1}\n')
    with pytest.raises(ValueError, match='scalars.json: line 1 is not JSON'):
        read_training_log(tmp_path)


@pytest.mark.parametrize('key', ['step', 'epoch', 'time', 'loss'])
@pytest.mark.parametrize('value', [None, 'x', [1]])
def test_what_is_no_number_is_named(tmp_path, write_run, key, value):
    write_run(tmp_path, '1', [{'loss': 1, 'step': 1}, {'loss': 1, 'step': 2, key: value}])
    with pytest.raises(ValueError, match=f'scalars.json: line 2 has {key} .*, which is no number'):
        read_training_log(tmp_path)
