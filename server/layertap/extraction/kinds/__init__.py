"""The extractor kinds, a file each: ``kinds/x.py`` defines ``KIND`` for ``Extractor.X``.

``base`` says what a kind is, and ``registry`` finds them.
"""
