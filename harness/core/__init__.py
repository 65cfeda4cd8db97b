"""The vocabulary: records, tables of precisions, placements, quantizers and metrics, units, errors. It imports nothing of ours."""
