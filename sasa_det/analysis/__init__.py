"""What a detector costs, how well it does and where it looks.

Import from the modules, each named after what it holds; some need all of mmdet and matplotlib:
:mod:`~sasa_det.analysis.flops`, :mod:`~sasa_det.analysis.costs`,
:mod:`~sasa_det.analysis.paper_tables`, :mod:`~sasa_det.analysis.paper_search`,
:mod:`~sasa_det.analysis.coco_numbers`,
:mod:`~sasa_det.analysis.training_log`, :mod:`~sasa_det.analysis.attention_maps`,
:mod:`~sasa_det.analysis.plots` and :mod:`~sasa_det.analysis.report`.
"""
