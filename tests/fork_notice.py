"""What the fork's mmdet prints when it is imported without OneDL, where its users are not asked."""

NOTICE = 'Could not import OneDL. Skipping OneDL datasets.\n'


def without_notice(text):
    """Remove it from what a process printed."""
    return text.replace(NOTICE, '')
