"""The command ``sasa-det``: one file per sub-command, with heavy imports only inside of functions.

Sub-commands with code of their own are in modules such as :mod:`~sasa_det.cli.configs` and
:mod:`~sasa_det.cli.predict`. Those in :mod:`~sasa_det.cli.hand_over` pass their arguments on to
other programs.
"""
