"""Run logs, HTML reports and TensorBoard output."""
