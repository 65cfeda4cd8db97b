"""Bytes and seconds of a case, term by term."""
