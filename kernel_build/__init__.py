"""How the shared libraries are built: which files, for which machines, with which flags. Needs neither torch nor nvcc.

setup.py runs the compilers. Tests and tools read the same tables.
"""
