"""Reading checkpoints safely, and saying whether they fit a model."""

__all__ = ['safe_loading']


def __getattr__(name: str):
    # Not at import: mmengine may be half imported when the types that it saves are allowed.
    if name == 'safe_loading':
        from .loading import safe_loading

        return safe_loading
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
