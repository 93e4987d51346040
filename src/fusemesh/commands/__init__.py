"""The commands of ``fusemesh``, one module each, with ``NAME``, ``SUMMARY``, ``USAGE``, ``add_options(parser)``
and ``run(options)``; :mod:`fusemesh.cli` reads nothing else of them. Importing them imports neither torch nor numpy.
"""
