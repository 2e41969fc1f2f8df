"""A study: its jobs, records, statistics, tables and figures."""
