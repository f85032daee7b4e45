"""The run config: schema, YAML with line numbers, overrides.

The schema is the contract of YAML, command line and pages.
"""
