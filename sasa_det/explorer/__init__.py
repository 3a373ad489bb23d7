"""A web page on which a person sees where a detector's attention looks.

:mod:`~sasa_det.explorer.page` is the page, in Gradio; all that it shows comes from the others, which do
without: :mod:`~sasa_det.explorer.session` asks the detector, :mod:`~sasa_det.explorer.pictures` draws.
"""
