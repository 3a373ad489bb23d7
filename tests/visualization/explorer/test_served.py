"""The page's server, asked by a program that means it no good."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import cv2
import numpy as np
import pytest

httpx = pytest.importorskip('httpx', reason='the explorer\'s page needs gradio: the extra "demo"')

BUSY = 'Queue is full'


class Visitor:
    """A session, asking as the page's own script does."""

    def __init__(self, url):
        self.url = url.rstrip('/')
        self.client = httpx.Client(timeout=300)
        self.config = self.client.get(f'{self.url}/config').json()
        self.session = f'test{id(self)}'

    def upload(self, data, name='image.png'):
        files = {'files': (name, data, 'image/png')}
        return self.client.post(f'{self.url}/gradio_api/upload', files=files)

    def ask(self, name, *data, event=None):
        """The answer's data and whether it is one, or a refusal's text."""
        (number,) = [d['id'] for d in self.config['dependencies'] if d['api_name'] == name]
        body = dict(data=data, fn_index=number, session_hash=self.session, event_data=event)
        joined = self.client.post(f'{self.url}/gradio_api/queue/join', json=body)
        if joined.status_code != 200:
            return joined.text
        query = dict(session_hash=self.session)
        with self.client.stream('GET', f'{self.url}/gradio_api/queue/data', params=query) as events:
            for line in events.iter_lines():
                message = json.loads(line[6:]) if line.startswith('data: ') else {}
                if message.get('msg') == 'process_completed':
                    output = message['output']
                    return output['data'] if message['success'] else str(output)
        raise AssertionError('the server ended without an answer')

    def file(self, path):
        return dict(path=path, orig_name='image.png', meta=dict(_type='gradio.FileData'))


LAYER = 'backbone.layer2.0.conv2'


@pytest.fixture
def visitor(url):
    return Visitor(url)


@pytest.fixture(scope='module')
def addresses():
    """Where this process connects to while a test runs."""
    connected = []
    sys.addaudithook(
        lambda event, args: connected.append(args[1]) if event == 'socket.connect' else None
    )
    return connected


def test_an_uploaded_image_is_looked_at(visitor, image_file):
    (path,) = visitor.upload(image_file.read_bytes()).json()
    message, _, x, y, picture, *_ = visitor.ask('detect', visitor.file(path), LAYER, None)
    assert (message, x, y) == ('', 90, 60)
    shown = visitor.client.get(f'{visitor.url}/gradio_api/file={picture["path"]}').content
    shown = cv2.imdecode(np.frombuffer(shown, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (360, 540, 3)

    message, x, y, *_ = visitor.ask(
        'click', None, LAYER, None, event=dict(index=[33, 7], value=None)
    )
    assert (message, x, y) == ('', 11, 2)
    message, _, _, where, _, _, table = visitor.ask('look', None, 100, 20, LAYER, None)
    assert message == '' and LAYER in where and len(table['data']) == 4


def test_what_is_asked_wrongly_is_answered_by_a_sentence(visitor):
    def says(text, *args, **kwargs):
        answer = visitor.ask(*args, **kwargs)
        message = answer[0] if isinstance(answer, list) else answer
        assert text in message, message

    says('There is no image yet', 'look', None, 1, 1, LAYER, None)
    says('There is no image yet', 'click', None, LAYER, None, event=dict(index=[1, 1], value=None))
    says('No image was given', 'detect', None, LAYER, None)
    says('There is no such example', 'example', LAYER, None, event=dict(index=7, value=None))
    for index in ('../../etc/passwd', -1, None, [0]):
        says('no such example', 'example', LAYER, None, event=dict(index=index, value=None))
    visitor.ask('begin', LAYER, None)
    says('a pair of whole numbers', 'click', None, LAYER, None, event=dict(index='a', value=None))
    says('There is no pixel', 'click', None, LAYER, None, event=dict(index=[-9, 1], value=None))
    says('Give both x and y', 'look', None, None, 1, LAYER, None)


def test_uploads_that_are_too_large_or_no_images(visitor):
    assert visitor.upload(bytes(11 * 2**20)).status_code == 413
    (path,) = visitor.upload(b'\x89PNG\r\n\x1a\n' + bytes(100)).json()
    assert (
        'not an image that can be read' in visitor.ask('detect', visitor.file(path), LAYER, None)[0]
    )
    (path,) = visitor.upload(b'import os', 'run.py').json()
    answer = visitor.ask('detect', visitor.file(path), LAYER, None)
    assert isinstance(answer, str) and 'nvalid file type' in answer


@pytest.mark.parametrize(
    'name', ['../../../escaped.png', '/tmp/escaped.png', '..\\escaped.png', '....//a.png']
)
def test_a_file_name_leads_nowhere(visitor, image_file, name, tmp_path):
    (path,) = visitor.upload(image_file.read_bytes(), name).json()
    assert '/gradio/' in path and '..' not in path.split('/')


def test_files_of_the_machine_stay_there(visitor, model, tmp_path):
    secret = tmp_path / 'secret.png'
    cv2.imwrite(str(secret), np.zeros((40, 40, 3), np.uint8))
    for path in (
        secret,
        '/etc/passwd',
        model.cfg.filename,
        'pyproject.toml',
        '../../../../etc/passwd',
    ):
        answer = visitor.ask('detect', visitor.file(str(path)), LAYER, None)
        assert isinstance(answer, str), answer
        for spelling in (quote(str(path)), quote(str(path), safe='')):
            got = visitor.client.get(f'{visitor.url}/gradio_api/file={spelling}')
            assert got.status_code in (403, 404), (path, got.status_code)


def test_it_fetches_nothing_for_others(visitor):
    for address in ('http://127.0.0.1:1/a.png', 'http://192.0.2.1/a.png', 'file:///etc/passwd'):
        answer = visitor.ask('detect', visitor.file(address), LAYER, None)
        assert isinstance(answer, str), answer


def test_fifty_at_once_are_answered_or_told_that_it_is_busy(url, addresses, monkeypatch):
    # Pictures take the longest, and are not what this is about.
    for name in ('draw_heat', 'draw_grids'):
        monkeypatch.setattr(
            f'sasa_det.visualization.explorer.page.{name}', lambda _: np.zeros((9, 9, 3), np.uint8)
        )
    visitors = [Visitor(url) for _ in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda each: each.ask('begin', LAYER, None), visitors))
    answered = [each for each in answers if isinstance(each, list)]
    assert all(each[0] == '' for each in answered) and len(answered) >= 16
    assert all(BUSY in each for each in answers if isinstance(each, str))
    # And afterwards it is as before.
    assert Visitor(url).ask('begin', LAYER, None)[0] == ''
    assert {address[0] for address in addresses if isinstance(address, tuple)} == {'127.0.0.1'}
