"""`fitmatrix COMMAND`: parse, call, print, exit status; no arithmetic."""
