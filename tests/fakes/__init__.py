"""Fakes that speak on the wire: what the code under test meets is HTTP, not a mock of its own parts."""
