"""A web page that shows where a detector attends.

``page`` is the page, in Gradio. The other modules do not need Gradio: ``session`` runs the detector,
``pictures`` draws.
"""
