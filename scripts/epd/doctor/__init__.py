"""The preflight: what is known to go wrong on a host, checked before anything starts. Reads, changes nothing.

Modules, lowest first: `finding` → `subject` (what is looked at) → one module per part of the host, each with a function
`check` that yields findings → `examination` (all of them) and `report` (how a person or a program reads them).
"""
