"""Conformance suites, models and helpers that ship with the package; they need `pytest` and `hypothesis`.

An implementation proves itself by subclassing its kind's suite in a test module: `policies.PolicySuite` for policies,
`tiers.TierSuite` for tiers (docs/adding-a-tier.md).
"""
