"""The commands about whole datasets: `unidiff dataset` and `unidiff bulk`."""
