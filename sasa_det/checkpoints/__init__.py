"""How checkpoints are read safely, and whether they fit a model."""

__all__ = ['safe_loading']


def __getattr__(name: str):
    # Imported late: mmengine may be half imported when its types are allowed.
    if name == 'safe_loading':
        from .loading import safe_loading

        return safe_loading
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
