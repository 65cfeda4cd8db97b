"""The site over the results of many machines."""
