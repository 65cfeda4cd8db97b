"""The words everybody speaks: records, tables of precisions, placements, quantizers and metrics, units, errors; knows nothing else."""
