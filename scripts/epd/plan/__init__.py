"""From a topology and a description of the hosts to what runs where: cards, ports, compose files. Pure.

Modules, lowest first: `topology` and `hosts` (what is asked for, what there is) → `model` (how much memory it takes),
`cards`, `ports`, `fitting` → `placing` (the plan) → `compose` (files). Nothing here looks at a machine: `epd.survey`
does.
"""
