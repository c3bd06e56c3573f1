"""Zero-shot anomaly detection in literate notebooks; import from the modules, e.g. `from zsad_nb.anovl import AnoVL`."""
__version__ = "0.2.0"
