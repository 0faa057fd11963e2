"""The packaged image-text set: 1,906 Noto emoji with names, keywords and categories.

The ArrayRecord directory `emoji/1.0.0` beside this file is read like any other TFDS directory;
`prepare.py` is the script that made it, NOTICE says whose work it is.
"""
