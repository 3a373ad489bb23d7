"""The page in a real browser, as a person uses it."""

import shutil

import pytest

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chrome'))), None)
if CHROMIUM is None:
    pytest.skip('no Chromium on the PATH', allow_module_level=True)

PATIENCE = 60_000  # milliseconds; a busy machine draws slowly


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as started:
        # Containers often lack what the sandbox needs; the page is ours.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


class Visit:
    """The page, opened; remembers what it asks the network for and what its console says."""

    def __init__(self, browser, url):
        self.requests, self.faults = [], []
        self.page = browser.new_page(viewport=dict(width=1400, height=1100))
        self.page.set_default_timeout(PATIENCE)
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.faults.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector('#grids img')
        self.waits_for(lambda: self.point() == (48, 48))

    def waits_for(self, condition):
        for _ in range(PATIENCE // 100):
            if condition():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f'did not come about; the page says: {self.message()!r}')

    def point(self):
        return tuple(int(self.page.input_value(f'#{axis} input') or -1) for axis in 'xy')

    def message(self):
        return self.page.inner_text('#message').strip()

    def where(self):
        return self.page.inner_text('#where')

    def pictures(self):
        return [
            self.page.get_attribute(f'#{name} img', 'src') for name in ('picture', 'heat', 'grids')
        ]

    def changes(self, act):
        before = self.pictures()
        act()
        self.waits_for(lambda: all(a != b for a, b in zip(before, self.pictures())))

    def upload(self, path):
        self.page.set_input_files('#upload input[type=file]', path)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)


@pytest.fixture
def visit(browser, url):
    visit = Visit(browser, url)
    yield visit
    assert visit.faults == []
    visit.page.close()


def test_it_starts_with_an_example_and_asks_nothing_of_the_network(visit):
    assert visit.where().startswith('FPN, P5: a map of 6 x 6 cells')
    assert visit.message() == ''
    table = visit.page.inner_text('#table')
    assert 'looks most at' in table and 'own cell' in table
    # The name of the file is text, never markup.
    assert 'Detector: epoch_<b>1</b>.pth' in visit.page.inner_text('#detector')
    assert visit.requests
    strangers = [
        url for url in visit.requests if not url.startswith(('http://127.0.0.1', 'data:', 'blob:'))
    ]
    assert strangers == []


def test_a_click_is_the_pixel_under_it(visit):
    picture = visit.page.locator('#picture img')
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    place = dict(x=box['width'] * 0.25, y=box['height'] * 0.75)
    visit.changes(lambda: picture.click(position=place))
    x, y = visit.point()
    assert abs(x - 24) <= 1 and abs(y - 72) <= 1


def test_upload_and_bad_files(visit, image_file, tmp_path):
    visit.changes(lambda: visit.upload(image_file))
    visit.waits_for(lambda: visit.point() == (90, 60))

    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'not an image')
    before = visit.pictures()
    visit.page.click('#upload button[aria-label="Clear"]')
    visit.upload(bad)
    visit.waits_for(lambda: 'not an image that can be read' in visit.message())
    assert visit.pictures() == before and visit.point() == (90, 60)

    large = tmp_path / 'large.png'
    large.write_bytes(bytes(11 * 2**20))
    visit.page.click('#upload button[aria-label="Clear"]')
    visit.upload(large)
    visit.page.wait_for_selector('text=/maximum allowed size|exceed/i')


def test_all_of_it_by_keyboard(visit):
    page = visit.page
    page.focus('#layer input')
    visit.press('ArrowDown', 'Enter')
    visit.waits_for(lambda: visit.where().startswith('FPN, P6'))
    page.focus('#layer input')
    visit.press(*['ArrowDown'] * 5, 'Enter')
    visit.waits_for(lambda: visit.where().startswith('Head'))
    page.wait_for_selector('#level input')
    assert page.inner_text('#level').split()[-4:] == ['P3', 'P4', 'P5', 'P6']
    page.locator('#level input').nth(0).focus()
    visit.press('Tab', 'Space')  # in Gradio's radio buttons each is a stop of its own
    visit.waits_for(lambda: 'each 16 x 16 pixels' in visit.where())

    page.focus('#x input')
    visit.changes(lambda: visit.press(*['ArrowUp'] * 8))  # 8 pixels of the image are a cell
    assert visit.point() == (56, 48)
    page.keyboard.press('Control+A')
    page.keyboard.type('9999')
    visit.waits_for(
        lambda: 'There is no pixel x = 9999, y = 48: x goes from 0 to 95' in visit.message()
    )
    page.keyboard.press('Control+A')
    page.keyboard.type('5')
    visit.waits_for(lambda: visit.message() == '')

    page.locator('#examples button').nth(2).focus()
    visit.changes(lambda: visit.press('Enter'))
    assert visit.where().startswith('Head')  # the layer stays


def test_tab_reaches_every_control(visit):
    reached = set()
    for _ in range(40):
        visit.press('Tab')
        reached.add(
            visit.page.evaluate(
                '["upload", "examples", "x", "y", "layer"].find('
                'id => document.getElementById(id).contains(document.activeElement))'
            )
        )
    assert {'upload', 'examples', 'x', 'y', 'layer'} <= reached
