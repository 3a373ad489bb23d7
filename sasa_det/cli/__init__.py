"""The command ``sasa-det``: one file a sub-command; heavy imports only inside of them.

Here are those sub-commands that have something to do of their own, in :mod:`~sasa_det.cli.configs`,
:mod:`~sasa_det.cli.predict` and :mod:`~sasa_det.cli.explain`; the others, in
:mod:`~sasa_det.cli.hand_over`, pass their arguments on to what does the work.
"""
