"""What the page's server answers: requests to its own address, from its own page, of few kinds.

A browser sends requests for any page that it shows. By the names in a request's headers the server
tells its own page from others: from those of other sites, and from those whose name was made to
point at this machine (DNS rebinding).
"""

import asyncio
import json
import re
from ipaddress import ip_address
from typing import List, Optional, Sequence, Tuple

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse

from ...data.entry_problems import shortened
from .uploads import MEGABYTES, NO_UPLOAD, UNREAD_FOR, Uploads

API = '/gradio_api'
# What the page's script posts, besides uploads and calls.
POSTS = ('/cancel', '/reset')
LARGEST_CALL = 2**20  # bytes
LARGEST_UPLOAD = MEGABYTES * 2**20 + 2**16  # bytes, with the headers around the file
PATIENCE = 120  # seconds for an upload to arrive

_AUTHORITY = re.compile(r'([\w.-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?', re.ASCII | re.IGNORECASE)


class Gate:
    """An ASGI middleware that refuses what the page itself would not ask.

    Args:
        app: Gradio's app.
        host: The address that the server listens at.
        names: Other names of the server, from :func:`parse_names`.
        uploads: Where uploads go.
    """

    def __init__(self, app, host: str, names: Sequence[tuple], uploads: Uploads) -> None:
        self.app = app
        self._host = _plain(host)
        self._names = names
        self._uploads = uploads

    async def __call__(self, scope, receive, send) -> None:
        """Answer a request, or pass it on."""
        if scope['type'] == 'websocket':  # the page uses none
            await send(dict(type='websocket.close'))
            return
        if scope['type'] == 'http':
            request = Request(scope, receive)
            path = scope['path'].rpartition(API)[2]
            call = path == '/queue/join'
            try:
                self._check_names(request)
                if request.method == 'POST':
                    if path == '/upload':
                        await JSONResponse([await self._upload(request)])(scope, receive, send)
                        return
                    if not (call or path in POSTS):
                        raise HTTPException(404, 'The page asks nothing of that address.')
                    receive = await self._checked(request, call)
                elif request.method not in ('GET', 'HEAD', 'OPTIONS'):
                    raise HTTPException(405, f'The page takes no {shortened(request.method)}.')
            except HTTPException as error:
                # The page's script shows the text of a refused upload, and the detail of a call.
                answer = (
                    JSONResponse(dict(detail=error.detail, error=error.detail), error.status_code)
                    if call
                    else PlainTextResponse(error.detail, error.status_code)
                )
                await answer(scope, receive, send)
                return
            except ClientDisconnect:
                return
        await self.app(scope, receive, send)

    def _check_names(self, request: Request) -> None:
        server, host = request.scope.get('server'), request.headers.get('host', '')
        if not self._is_own(host, server):
            raise HTTPException(
                403,
                f'The explorer does not answer at {shortened(host)}, but at the address that it '
                'printed; its option --name adds another.',
            )
        origin = request.headers.get('origin')
        if origin is None:  # not from a script
            return
        scheme, _, authority = origin.partition('://')
        if scheme not in ('http', 'https') or not self._is_own(authority, server):
            raise HTTPException(
                403,
                f'The explorer answers its own page only, not that of {shortened(origin)}; its '
                'option --name adds another.',
            )

    def _is_own(self, authority: str, server: Optional[Tuple[str, int]]) -> bool:
        try:
            name, port = _name_and_port(authority)
        except ValueError:
            return False
        address, served = server or (None, None)
        if any(name == known and port in (at or served, at) for known, at in self._names):
            return True
        own = {self._host, _plain(address or '')}
        if any(map(_is_loopback, own)):
            own |= {'localhost', '127.0.0.1', '::1'}
        return name in own - {''} and (port or 80) == served

    async def _upload(self, request: Request) -> str:
        """Store the one image of an upload."""
        size = _length(request, LARGEST_UPLOAD, f'The file is larger than {MEGABYTES} MB')
        try:
            path = self._uploads.reserve(size)
        except ValueError as error:
            raise HTTPException(503, str(error)) from None
        try:
            data = await asyncio.wait_for(_only_file(request), PATIENCE)
            if len(data) > MEGABYTES * 2**20:
                raise HTTPException(413, f'The file is larger than {MEGABYTES} MB, the limit.')
            await run_in_threadpool(path.write_bytes, data)
        except asyncio.TimeoutError:
            self._uploads.delete(path)
            raise HTTPException(408, f'The upload took longer than {PATIENCE} seconds.') from None
        except BaseException:
            self._uploads.delete(path)
            raise
        asyncio.get_running_loop().call_later(UNREAD_FOR, self._uploads.delete, path)
        return str(path)

    async def _checked(self, request: Request, call: bool):
        """Check a small request; returns what gives its body once more."""
        _length(request, LARGEST_CALL, 'The request is larger than 1 MB')
        body = await request.body()
        if call:
            self._check_files(body)
        rest = iter([dict(type='http.request', body=body, more_body=False)])

        async def receive():
            return next(rest, None) or await request.receive()

        return receive

    def _check_files(self, body: bytes) -> None:
        """Refuse other files than uploads: Gradio would fetch those that are on other machines."""
        paths = []
        try:
            data = json.dumps(json.loads(body)['data'])
            json.loads(data, object_hook=lambda found: paths.extend(_path(found)))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise HTTPException(400, 'The request cannot be read.') from None
        if len(paths) > 1:
            raise HTTPException(400, 'Give one image at a time.')
        if not all(path in self._uploads for path in paths):
            raise HTTPException(400, NO_UPLOAD)


def parse_names(names: Sequence[str]) -> List[Tuple[str, Optional[int]]]:
    """Read the names of a server, each with a port or without.

    Args:
        names: Such as a browser's address line has them.

    Raises:
        ValueError: One is no name.

    Examples:
        >>> parse_names(['explorer.example.org', 'gpu:8000'])
        [('explorer.example.org', None), ('gpu', 8000)]
    """
    return [_name_and_port(name) for name in names]


async def _only_file(request: Request) -> bytes:
    """Read the one file of a form."""
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            (file,) = form.values()
            return await file.read()
    except (HTTPException, ValueError, AttributeError):  # more than one, none, or no file
        raise HTTPException(400, 'Give one image at a time, as a form.') from None


def _length(request: Request, most: int, too_large: str) -> int:
    """Read a request's length, which the server holds it to."""
    length = request.headers.get('content-length', '')
    # Of two kinds of length the server would take the other one.
    if not length.isdecimal() or 'transfer-encoding' in request.headers:
        raise HTTPException(411, 'The request does not say its length.')
    if int(length) > most:
        raise HTTPException(413, f'{too_large}, the limit.')
    return int(length)


def _path(found: dict) -> list:
    return [found['path']] if 'path' in found else []


def _name_and_port(authority: str) -> Tuple[str, Optional[int]]:
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        raise ValueError(
            f'{shortened(authority)} is not a name as in an address, with a port or without'
        )
    name, port = found.groups()
    return _plain(name), port and int(port)


def _plain(name: str) -> str:
    """Write a name or an address in one way."""
    name = name.removeprefix('[').removesuffix(']').lower()
    try:
        return str(ip_address(name))
    except ValueError:
        return name


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == 'localhost'
