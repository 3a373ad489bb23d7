"""The version of sasa_det; setup.cfg and everything else read it here."""

__version__ = '0.1.0'
