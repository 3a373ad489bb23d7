"""The page's server, asked by a program that means it no good."""

import functools
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit
from uuid import uuid4

import cv2
import numpy as np
import pytest

from sasa_det.visualization.explorer import uploads

httpx = pytest.importorskip('httpx', reason='the explorer\'s page needs gradio: the extra "demo"')

from sasa_det.visualization.explorer import gate  # noqa: E402  it needs gradio's packages

BUSY = 'Queue is full'


class Visitor:
    """A session, asking as the page's own script does."""

    def __init__(self, url):
        self.url = url.rstrip('/')
        self.client = httpx.Client(timeout=300)
        self.config = self.client.get(f'{self.url}/config').json()
        self.session = f'test{uuid4()}'

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


def refused(answer, status, text):
    assert (answer.status_code, answer.headers['content-type'].split(';')[0]) == (
        status, 'text/plain',
    )  # fmt: skip
    assert text in answer.text and answer.text.endswith('.')


def test_uploads_that_are_too_large_or_no_images(visitor):
    for size in (10 * 2**20 + 1, 11 * 2**20):
        refused(visitor.upload(bytes(size)), 413, 'The file is larger than 10 MB')
    for data, name in ((b'\x89PNG\r\n\x1a\n' + bytes(100), 'a.png'), (b'import os', 'run.py')):
        (path,) = visitor.upload(data, name).json()
        message = visitor.ask('detect', visitor.file(path), LAYER, None)[0]
        assert 'not an image that can be read' in message


def test_one_image_at_a_time(visitor, image_file):
    data = image_file.read_bytes()
    post = functools.partial(visitor.client.post, f'{visitor.url}/gradio_api/upload')
    for number in (2, 10):
        files = [('files', (f'{place}.png', data, 'image/png')) for place in range(number)]
        refused(post(files=files), 400, 'Give one image at a time')
    refused(post(data=dict(files='text')), 400, 'Give one image at a time')
    refused(post(content=b'{}'), 400, 'Give one image at a time')
    refused(post(content=iter([b'no length'])), 411, 'does not say its length')
    both = {'content-length': '9', 'transfer-encoding': 'chunked'}
    refused(post(content=iter([b'no length']), headers=both), 411, 'does not say its length')

    uploaded = [visitor.file(visitor.upload(data).json()[0]) for _ in range(2)]
    assert 'Give one image at a time' in visitor.ask('detect', uploaded, LAYER, None)
    assert visitor.ask('detect', uploaded[0], LAYER, None)[0] == ''


def test_an_upload_is_deleted_once_it_is_read(visitor, image_file):
    for data in (image_file.read_bytes(), b'not an image'):
        # The same content of two visitors is two files.
        paths = [Path(visitor.upload(data).json()[0]) for _ in range(2)]
        assert all(path.read_bytes() == data for path in paths)
        for left, path in enumerate(paths, -1):
            visitor.ask('detect', visitor.file(str(path)), LAYER, None)
            assert not path.exists() and paths[1].exists() == (left < 0)
        answer = visitor.ask('detect', visitor.file(str(paths[0])), LAYER, None)
        assert 'There is no such upload' in answer


def test_an_upload_is_deleted_if_it_is_not_read(visitor, image_file, monkeypatch):
    monkeypatch.setattr(gate, 'UNREAD_FOR', 0.1)
    path = Path(visitor.upload(image_file.read_bytes()).json()[0])
    for _ in range(100):
        if not path.exists():
            break
        time.sleep(0.1)
    assert not path.exists()


def test_uploads_take_a_limited_space_together(visitor, image_file, monkeypatch):
    # Images of other tests may still wait; one that is read is deleted.
    (path,) = visitor.upload(b'any').json()
    for waiting in Path(path).parent.iterdir():
        visitor.ask('detect', visitor.file(str(waiting)), LAYER, None)
    monkeypatch.setattr(uploads, 'TOGETHER', 2)
    data = bytes(2**19)
    kept = [visitor.upload(data).json()[0] for _ in range(3)]
    for _ in range(3):
        refused(visitor.upload(data), 503, 'take up the 2 MB')
    # One that is refused takes no space, and one that is read gives its own back.
    assert visitor.upload(b'small').status_code == 200
    visitor.ask('detect', visitor.file(kept[0]), LAYER, None)
    assert visitor.upload(data).status_code == 200
    refused(visitor.upload(data), 503, 'Try again')


class TestNames:
    """The page answers at its own address, to its own page; what others ask does nothing."""

    OTHERS = ('evil.example', 'evil.example:{port}', '127.0.0.1:1', '127.0.0.1', '127.0.0.1.nip.io:{port}',
              '169.254.0.1:{port}', 'me@127.0.0.1:{port}', '[', '127.0.0.1:{port}:', '')  # fmt: skip
    OWN = ('127.0.0.1:{port}', 'localhost:{port}', 'LOCALHOST:{port}', '[::1]:{port}')

    @staticmethod
    def get(url, host, **headers):
        host = host.format(port=urlsplit(url).port)
        return httpx.get(f'{url}config', headers=dict(host=host, **headers))

    @pytest.mark.parametrize('host', OTHERS)
    def test_other_hosts(self, url, host):
        refused(self.get(url, host), 403, 'The explorer does not answer at ')

    @pytest.mark.parametrize('host', OWN)
    def test_its_own(self, url, host):
        assert self.get(url, host).status_code == 200

    @pytest.mark.parametrize('origin', [*OTHERS[:-1], 'null', 'file://', None])
    def test_uploads_of_other_pages(self, visitor, image_file, origin):
        port = urlsplit(visitor.url).port
        own = {'origin': f'http://localhost:{port}'}
        assert len(self.upload(visitor, image_file, own).json()) == 1
        origin = str(origin).format(port=port)
        origin = origin if origin in ('null', 'file://') else f'http://{origin}'
        refused(self.upload(visitor, image_file, dict(origin=origin)), 403, 'its own page only')

    @staticmethod
    def upload(visitor, image_file, headers):
        return visitor.client.post(
            f'{visitor.url}/gradio_api/upload',
            files=dict(files=('a.png', image_file.read_bytes())),
            headers=headers,
        )

    def test_calls_of_other_pages(self, visitor):
        body = dict(data=[LAYER, None], fn_index=0, session_hash='a')
        answer = visitor.client.post(
            f'{visitor.url}/gradio_api/queue/join',
            json=body,
            headers=dict(origin='http://evil.example'),
        )
        assert answer.status_code == 403
        # In the form that the page's script shows.
        assert "its own page only, not that of 'http://evil.example'" in answer.json()['detail']

    @pytest.fixture
    def serve(self, explorer, examples):
        from sasa_det.visualization.explorer import page

        pages = []

        def serve(host, names=()):
            pages.append(page.build_page(explorer, examples, 'a'))
            return page.serve(pages[-1], host, None, block=False, names=names)

        yield serve
        for each in pages:
            each.close(verbose=False)

    def test_names_that_the_user_adds(self, serve):
        names = ['explorer.example.org', 'tunnel:8000']
        url = serve('0.0.0.0', names)
        own = ('localhost:{port}', '127.0.0.1:{port}', 'explorer.example.org', 'tunnel:8000',
               'explorer.example.org:{port}')  # fmt: skip
        for host in own:
            assert self.get(url, host, origin=f'https://{names[0]}').status_code == 200, host
        for host in ('tunnel', 'tunnel:{port}', 'explorer.example.org:1', 'example.org', '1.2.3.4'):
            refused(self.get(url, host), 403, '--name')

    @pytest.mark.skipif(not Path('/proc/net/if_inet6').exists(), reason='this machine has no IPv6')
    def test_ipv6(self, serve):
        url = serve('::1')
        assert url.startswith('http://[::1]:')
        assert self.get(url, '[::1]:{port}').status_code == 200
        refused(self.get(url, '[::2]:{port}'), 403, 'does not answer at')

    @pytest.mark.parametrize('name', ['', 'http://gpu', 'gpu/page', 'gpu:port', 'me@gpu', 'a b'])
    def test_what_is_no_name(self, name):
        with pytest.raises(ValueError, match='is not a name as in an address'):
            gate.parse_names([name])


def test_it_is_asked_for_nothing_but_what_the_page_needs(visitor):
    for path in ('gradio_api/component_server', 'gradio_api/process_recording', 'login',
                 'gradio_api/run/begin', 'gradio_api/call/begin', 'gradio_api/vibe-edit'):  # fmt: skip
        answer = visitor.client.post(f'{visitor.url}/{path}', json=dict(data=[LAYER, None]))
        refused(answer, 404, 'asks nothing')
    refused(visitor.client.delete(f'{visitor.url}/config'), 405, "takes no 'DELETE'")
    join = functools.partial(visitor.client.post, f'{visitor.url}/gradio_api/queue/join')
    assert join(content=bytes(2**20 + 1)).status_code == 413
    for body in (b'', b'[]', b'{}', b'\xff', b'{"data": ' + b'[' * 10**5):
        assert join(content=body).json()['detail'] == 'The request cannot be read.'


@pytest.mark.parametrize(
    'name', ['../../../escaped.png', '/tmp/escaped.png', '..\\escaped.png', '....//a.png']
)
def test_a_file_name_leads_nowhere(visitor, image_file, name, tmp_path):
    (path,) = visitor.upload(image_file.read_bytes(), name).json()
    assert Path(path).parent.name == 'uploads' and re.fullmatch('[0-9a-f]{32}', Path(path).name)


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
    for address in (
        'http://127.0.0.1:1/a.png', 'http://192.0.2.1/a.png', 'https://example.org/a.png',
        'file:///etc/passwd',
    ):  # fmt: skip
        # Wherever it stands.
        for data in ([visitor.file(address), LAYER], [None, visitor.file(address)]):
            answer = visitor.ask('detect', *data, None)
            assert 'There is no such upload' in answer


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
