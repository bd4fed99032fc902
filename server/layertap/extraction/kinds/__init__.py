"""The extractor kinds, one file each: ``kinds/x.py`` defines ``KIND`` for ``Extractor.X``.

``base`` defines the interface of a kind, and ``registry`` finds the kinds.
"""
