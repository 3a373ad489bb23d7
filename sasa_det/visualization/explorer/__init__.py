"""A web page on which a person sees where a detector's attention looks.

``page`` is the page, in Gradio; all that it shows comes from the others, which do without: ``session`` asks
the detector, ``pictures`` draws.
"""
