"""`fitmatrix COMMAND`, one module each: HELP, `add_arguments` and `run`. Parse, call, print, exit status; no arithmetic.

All of these modules are imported to build the parser, so slow imports are made in `run`.
"""
